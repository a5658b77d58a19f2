"""Trainers killed with SIGKILL at any moment: every resume ends with the same bytes of weights as the unbroken run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forks import ROOT, Death, Forked, Server
from trainer.events import Event, EventReader, rewind
from trainer.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")]

SETTINGS = ["sample.every=3", "sample.before=true", 'sample.prompts=["a red circle", "a blue circle"]', "output.keep=1",
            "evaluate.distance=efflite0", "adapter.rank=2"]
PATIENCE = 180  # seconds: others use the machine

Moment = Death | Callable[[list[Event]], bool] | float

# In the order in which a run comes past them.
FILE_OPERATIONS = [
    Death("os.rename", ".preset.toml"),
    Death("os.rename", "/cache/", 3),  # captions
    Death("os.rename", "/cache/", 20),  # latents
    Death("os.rename", "000000_01.tmp"),  # pictures before training
    Death("open", ".step_000003.tmp/progress.json"),  # a checkpoint, half of it
    Death("os.rename", ".step_000003.tmp"),  # a checkpoint, whole but without its name
    Death("os.rename", "-000003.safetensors."),  # its export
    Death("os.rename", "000003_01.tmp"),  # pictures on the way
    Death("shutil.rmtree", "step_000003"),  # an old checkpoint is let go
    Death("os.rename", "/.run.safetensors."),  # the file to use
    Death("os.rename", "000006_00.tmp"),  # the last pictures
    Death("os.rename", "/cache/"),  # features for KID and FID
]


def said(kind: str, **fields: object) -> Callable[[list[Event]], bool]:
    """Whether an event came that has these fields."""
    return lambda events: any(event["kind"] == kind and fields.items() <= event.items() for event in events)


IN_BETWEEN = [said("phase", name="caching captions"), said("phase", name="loading the denoiser"), said("step", step=1),
              said("validation", step=3), said("step", step=4), said("checkpoint", step=6)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


class Broken:
    """A run that is killed again and again, and started again as a person would."""

    def __init__(self, server: Server, preset: Path, workspace: Path, method: str) -> None:
        self.server, self.run = server, Run(workspace / "runs" / "run")
        overrides = [f"--set={item}" for item in [*SETTINGS, f"adapter.method={method}"]]
        self.first = ["--preset", preset, "--workspace", workspace, "--name", "run", *overrides]

    def start(self, death: Death | None = None) -> Forked:
        again = ["--resume", self.run.path] if self.run.preset.is_file() else self.first
        return self.server.start(*again, death=death)

    def killed(self, moment: Moment) -> bool:
        """Start, and kill at a moment: a file operation, an event, or seconds. False when it ended before."""
        known = EventReader(self.run.events)
        known.read()
        trainer = self.start(moment if isinstance(moment, Death) else None)
        if callable(moment):
            self._wait_for(trainer, known, moment)
        elif isinstance(moment, float):
            time.sleep(moment)
        code = trainer.wait() if isinstance(moment, Death) else trainer.kill()
        assert code in (0, -signal.SIGKILL)
        return code != 0

    def _wait_for(self, trainer: Forked, reader: EventReader, seen: Callable[[list[Event]], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while trainer.is_running() and not seen(reader.read()):
            assert time.monotonic() < deadline, self.run.log_tail()
            time.sleep(0.001)


def tensor_bytes(file: Path) -> str:
    """A hash of a safetensors file without its header, which holds times."""
    data = file.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()


def weights(run: Run) -> dict[str, str]:
    """Every file of weights that a run left, and what is in it."""
    return {path.relative_to(run.path).as_posix(): tensor_bytes(path) for path in run.path.rglob("*.safetensors")}


def numbers(run: Run) -> list[tuple[object, ...]]:
    """What still holds of the run's measures, once each: a kill may repeat those of step 0 and of its last save."""
    lines = {(event["kind"], event["step"], event.get("loss"), event.get("kid"))
             for event in rewind(EventReader(run.events).read()) if event["kind"] in ("step", "validation", "distance")}
    return sorted(lines, key=str)


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix in (".tmp", ".partial")]


def names(run: Run) -> set[str]:
    """What a run's folder holds; TensorBoard makes a file a start."""
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if "tfevents" not in path.name}


def assert_crashed(run: Run) -> None:
    state = run.state()
    assert state.word == "new" if not run.events.exists() else state.word == "crashed"
    if state.word == "crashed":
        assert state.text == f"crashed; last saved at step {run.last_step()}"


def age(folder: Path) -> None:
    """Make what was left over old enough to be swept."""
    for path in left_over(folder):
        os.utime(path, (0, 0))


def assert_same_in_the_end(broken: Run, whole: Run) -> None:
    assert broken.state().word == "done"
    assert weights(broken) == weights(whole) and len(weights(whole)) == 4
    assert numbers(broken) == numbers(whole)
    assert names(broken) == names(whole)
    assert not left_over(broken.path)
    lines = broken.events.read_text("utf-8").splitlines()
    starts = [event["step"] for line in lines if (event := json.loads(line))["kind"] == "start"]
    assert starts == sorted(starts)


RANDOM = random.Random(7)
MOMENTS = {
    "lora": FILE_OPERATIONS,
    "stella": IN_BETWEEN,
    "stiefel": [RANDOM.uniform(0.1, 3.0) for _ in range(4)],
}


@pytest.mark.parametrize("method", MOMENTS)
def test_a_run_killed_at_any_moment_ends_like_the_unbroken_one(server, tiny_project, tmp_path, method) -> None:
    whole = Broken(server, tiny_project, tmp_path / "whole", method)
    assert whole.start().wait() == 0
    broken = Broken(server, tiny_project, tmp_path / "broken", method)
    kills = 0
    for moment in MOMENTS[method]:
        if broken.killed(moment):
            kills += 1
            assert_crashed(broken.run)
            age(tmp_path / "broken")
        else:  # on a busy machine a run may end before it is killed from outside
            assert not isinstance(moment, Death), f"the run ended without coming past {moment}"
    assert kills >= 2
    assert broken.start().wait() == 0, broken.run.log_tail()
    assert_same_in_the_end(broken.run, whole.run)
    assert not left_over(tmp_path / "broken" / "cache")


def test_sigterm_stops_after_the_step_and_a_second_trainer_is_refused_meanwhile(server, tiny_project, tmp_path) -> None:
    command = [sys.executable, "-m", "trainer", "--preset", str(tiny_project), "--workspace", str(tmp_path)]
    first = subprocess.Popen([*command, "--set=train.steps=100000", "--set=output.save_every=0"], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = Run(tmp_path / "runs" / "tiny")
    try:
        wait_for_step(run, 2)
        preset, lines = run.preset.read_text("utf-8"), len(EventReader(run.events).read())
        assert server.start("--resume", run.path, "--set", "log.every=7").wait() == 1
        assert run.preset.read_text("utf-8") == preset
        wait_for_step(run, 4)
        assert first.poll() is None and len(EventReader(run.events).read()) > lines
    finally:
        first.send_signal(signal.SIGTERM)
        said, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, said
    last = [event for event in EventReader(run.events).read() if event["kind"] == "step"][-1]["step"]
    assert run.state().word == "stopped" and run.last_step() == last
    assert server.start("--resume", run.path, "--set", f"train.steps={last + 1}").wait() == 0
    assert run.state().word == "done" and run.last_step() == last + 1


def wait_for_step(run: Run, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(event["kind"] == "step" and event["step"] >= step for event in EventReader(run.events).read()):
        assert time.monotonic() < deadline, run.log_tail()
        time.sleep(0.05)
