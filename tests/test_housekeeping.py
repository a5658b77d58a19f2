"""Between two steps: what is kept, what is told, and what must never end a run."""

from __future__ import annotations

import math
import shutil
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest

from tests import projects
from trainer import housekeeping
from trainer import preset as presets
from trainer import run as runs
from trainer.events import Event, EventReader
from trainer.loop import run_training
from trainer.run import Run
from trainer.session import Session


@pytest.fixture
def session(tiny_project, tmp_path) -> Session:
    return projects.session(tiny_project, tmp_path, "output.keep=1")


def events(run: Run, kind: str) -> list[Event]:
    return [event for event in EventReader(run.events).read() if event["kind"] == kind]


def broken_png(path: Path) -> None:
    """A picture whose header and checksums are right, and whose pixels are not."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"junk") + chunk(b"IEND", b""))


def test_the_best_of_the_saved_stays_whatever_was_measured_in_between(session) -> None:
    losses = {0: 0.1, 1: 0.5, 2: 0.3, 3: math.nan, 4: 0.4, 5: 0.6}  # 0 was never saved, nor was 2
    for step in (1, 3, 4, 5):
        session.progress.step = step
        session.progress.validation = {str(at): loss for at, loss in losses.items() if at <= step}
        assert housekeeping.save(session)
    assert session.run.checkpoint_steps() == [4, 5]
    assert sorted(path.name for path in session.run.exports.iterdir()) == [
        "run-000004.safetensors", "run-000005.safetensors"]


def test_a_disk_that_is_nearly_full_is_told_and_nothing_is_written(session, monkeypatch) -> None:
    session.progress.step = 1
    assert housekeeping.save(session)
    full = shutil.disk_usage(session.run.path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    session.progress.step = 2
    assert not housekeeping.save(session)
    assert session.run.checkpoint_steps() == [1]
    assert events(session.run, "note")[-1]["text"].startswith("no checkpoint at step 2: the disk of")


def test_a_measure_that_fails_is_a_note(tiny_project, tmp_path, monkeypatch) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("no number today")

    monkeypatch.setattr(housekeeping.evaluation, "validate", fail)
    monkeypatch.setattr(housekeeping.effective_rank, "summarize", fail)
    run = trained(tiny_project, tmp_path, "train.steps=1")
    assert run.state().word == "done"
    told = {note["text"].split(" failed")[0] for note in events(run, "note")}
    assert told == {"measuring the validation loss", "measuring the effective rank"}


def trained(preset_file: Path, workspace: Path, *overrides: str) -> Run:
    preset = presets.load(preset_file, overrides)
    run = runs.create(workspace, "run", presets.dumps(preset))
    run_training(run, preset, workspace)
    return run


def test_a_stop_while_pictures_are_drawn_keeps_the_step(tiny_project, tmp_path) -> None:
    overrides = ["output.save_every=0", "sample.every=4", "sample.steps=200"]
    preset = presets.load(tiny_project, overrides)
    run = runs.create(tmp_path, "run", presets.dumps(preset))

    def stop() -> None:
        deadline = time.monotonic() + 60
        while not any(event["name"] == "drawing samples" for event in events(run, "phase")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        run.request("stop")

    thread = threading.Thread(target=stop)
    thread.start()
    run_training(run, preset, tmp_path)
    thread.join()
    assert run.state().word == "stopped" and run.last_step() == 4
    assert run.result.exists() and run.export_of(4).exists() and not events(run, "sample")
    run_training(run, presets.load(run.preset, ["sample.steps=2"]), tmp_path)
    assert [event["step"] for event in events(run, "sample")] == [4, 6]  # what the stop kept from being drawn, too


def test_pictures_that_break_while_decoding_are_left_out_of_every_measure(own_project, tmp_path) -> None:
    projects.pictures(own_project.parent / "held", 5, seed=1)
    for name in ("held/000.png", "train/001.png"):
        broken_png(own_project.parent / name)
    run = trained(own_project, tmp_path, "evaluate.distance=efflite0", "evaluate.images=4", "train.steps=1")
    assert run.state().word == "done"
    assert {Path(event["file"]).parent.name for event in events(run, "skipped")} == {"held", "train"}
    assert [event["step"] for event in events(run, "validation")] == [0, 1]
    (distance,) = events(run, "distance")
    assert distance["n_ref"] == 4 and distance["nn_cosine"] is not None
    assert not [note for note in events(run, "note") if "failed" in note["text"]]
