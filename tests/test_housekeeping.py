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
        with open(own_project.parent / name, "ab") as file:
            file.write(name.encode())  # else one would be held out, and not trained on, as a copy of the other
    run = trained(own_project, tmp_path, "evaluate.distance=efflite0", "evaluate.images=4", "train.steps=1")
    assert run.state().word == "done"
    assert {Path(event["file"]).parent.name for event in events(run, "skipped")} == {"held", "train"}
    assert [event["step"] for event in events(run, "validation")] == [0, 1]
    (distance,) = events(run, "distance")
    assert distance["n_ref"] == 4 and distance["nn_cosine"] is not None
    assert not [note for note in events(run, "note") if "failed" in note["text"]]


STILL = ("train.lr=1e-30", "train.ema_decay=0", "train.steps=9", "evaluate.every=2", "output.save_every=2",
         "output.keep=1", "sample.prompts=[]")


def test_a_run_without_gain_ends_early_and_its_best_checkpoint_stays(tiny_project, tmp_path) -> None:
    run = trained(tiny_project, tmp_path, *STILL, "evaluate.early_stop=3")
    losses = {event["step"]: event["loss"] for event in events(run, "validation")}
    assert list(losses) == [0, 2, 4, 6] and min(losses, key=losses.__getitem__) == 0
    (end,) = events(run, "end")
    assert (end["step"], end["reason"]) == (6, "early")
    assert end["text"] == f"the last 3 validations brought no lower loss than {losses[0]:.4g} at step 0"
    state = run.state()
    assert (state.word, state.text) == ("early", f"stopped early at step 6: {end['text']}")
    assert len(set(losses.values())) == 1
    best = events(run, "best")[-1]["step"]  # as low as the others, and the first of them
    assert run.checkpoint_steps() == sorted({best, 6}) and run.export_of(best).is_file() and run.result.is_file()

    run_training(run, presets.load(run.preset), tmp_path)  # resumed as it is: three more validations
    assert [event["reason"] for event in events(run, "end")] == ["early", "done"]
    assert run.last_step() == 9 and run.state().word == "done"


def test_a_run_that_was_killed_before_its_early_end_was_told_still_ends_there(tiny_project, tmp_path) -> None:
    run = trained(tiny_project, tmp_path, *STILL, "evaluate.early_stop=2")
    assert run.state().word == "early" and run.last_step() == 4
    whole = run.events.read_text()
    lines = whole.splitlines(keepends=True)
    run.events.write_text("".join(line for line in lines if '"kind":"end"' not in line))
    run_training(run, presets.load(run.preset), tmp_path)
    assert (run.state().word, run.last_step(), len(events(run, "end"))) == ("early", 4, 1)
    run_training(run, presets.load(run.preset, ["evaluate.early_stop=0"]), tmp_path)
    assert (run.state().word, run.last_step()) == ("done", 9)


def test_the_best_is_told_when_it_changes_and_losses_of_another_measure_are_forgotten(tiny_project, tmp_path) -> None:
    run = trained(tiny_project, tmp_path, "train.steps=6", "train.lr=0.01", "evaluate.every=1", "output.save_every=2")
    losses = {event["step"]: event["loss"] for event in events(run, "validation")}
    told = events(run, "best")
    assert told[0]["why"] == "it is the only checkpoint with a validation loss" and told[0]["step"] == 2
    assert told[-1]["step"] == min((2, 4, 6), key=losses.__getitem__)
    assert (told[-1]["by"], told[-1]["value"]) == ("validation", pytest.approx(losses[told[-1]["step"]]))
    assert len({event["why"] for event in told}) == len(told) > 1

    changed = presets.load(run.preset, ["train.steps=8", "evaluate.images=1"])
    run_training(run, changed, tmp_path)
    assert any("is measured in another way from here on" in note["text"] for note in events(run, "note"))
    assert events(run, "best")[-1]["step"] == 8 and "only checkpoint" in events(run, "best")[-1]["why"]
