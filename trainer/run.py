"""A run's folder: its files, its lock, requests to it, and its state, which is derived and never stored."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.errors import UserError
from trainer.events import Event, last_event, newest_first
from trainer.files import write_atomic
from trainer.workfolder import WorkFolder

PINNED = "pinned"  # a file of this name in a checkpoint keeps it
SILENCE = 300.0  # seconds without an event after which a living run counts as stuck
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # on Windows

EXPORT = re.compile(r".+-(\d{6,})\.safetensors")  # a file in exports/, with its step


class Origin(NamedTuple):
    """The run, and its checkpoint, that another one began at."""

    run: str
    step: int


@dataclass(frozen=True)
class State:
    """What a run is doing: a word for the program, a text for a person, and how far it is."""

    word: Literal["new", "waiting", "starting", "training", "paused", "silent", "done", "early", "stopped", "failed",
                  "crashed"]
    text: str
    step: int = 0
    steps: int = 0
    alive: bool = False


class Run(WorkFolder):
    """The files of one run; see the architecture page for the layout."""

    work = "trained"

    def __init__(self, path: Path) -> None:
        super().__init__(path, "trainer.log")
        self.preset = path / "preset.toml"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.exports = path / "exports"
        self.tensorboard = path / "tensorboard"
        self.result = path / f"{path.name}.safetensors"
        self.notes = path / "notes.md"
        self._origin = path / "origin.json"

    def never_began(self) -> bool:
        """Whether a fault, or a kill while the folder was made, came before the first step: nothing is lost with it.

        What a person wrote about it would be, and so would the checkpoint that a branch began at, once the other run
        does not keep that one any more.
        """
        if not self.preset.exists():
            return self.path.is_dir() and all(entry.name == "control" or entry.name.startswith(f".{self.preset.name}.")
                                              for entry in self.path.iterdir())
        last, origin = last_event(self.events) or {}, self.origin()
        first = origin.step if origin else 0
        kept = origin is not None and Run(self.path.parent / origin.run).checkpoint(first).exists()
        files = [path for path in self.path.rglob("*.safetensors") if path.parent != self.checkpoint(first) or not kept]
        return (last.get("kind") == "end" and last.get("reason") == "error" and last.get("step") in (None, first)
                and not files and not self.notes.exists() and not self.is_held())

    def state(self, now: float | None = None) -> State:
        """The state after the table of the architecture page: is the lock held, and what was said last?

        Files that cannot be read make it "failed", so that one such folder does not hide the other runs.
        """
        try:
            return self._state(now)
        except OSError as error:
            return State("failed", f"{error.filename or self.path}: cannot be read: {error.strerror}")

    def _state(self, now: float | None) -> State:
        last, held = self.look(lambda: last_event(self.events))
        step, steps = _progress(self.events, last)
        if last is None:
            return State("starting", "starting", alive=True) if held else State("new", "not started yet")
        if held:
            return _living(last, step, steps, time.time() if now is None else now)
        if last["kind"] == "end":
            reason = last.get("reason")
            if reason == "error":
                return State("failed", f"failed at step {step}: {last.get('error', 'see trainer.log')}", step, steps)
            if reason == "early":
                why = last.get("text", "no gain was left")
                return State("early", f"stopped early at step {step}: {why}", step, steps)
            word = "done" if reason == "done" else "stopped"
            return State(word, f"{word} at step {step}", step, steps)
        return State("crashed", f"crashed; last saved at step {self.last_step()}", step, steps)

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a whole checkpoint, rising: a checkpoint gets its name only when it is complete."""
        found = (re.fullmatch(r"step_(\d{6,})", path.name) for path in self.checkpoints.glob("step_*"))
        return sorted(int(match.group(1)) for match in found if match)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def is_pinned(self, step: int) -> bool:
        """Whether a checkpoint stays, however many come after it."""
        return (self.checkpoint(step) / PINNED).exists()

    def pin(self, step: int, is_pinned: bool) -> None:
        """Keep a checkpoint for good, or no longer.  Raises `UserError` when it is not there any more."""
        if step not in self.checkpoint_steps():
            raise UserError(f"{self.name} has no checkpoint of step {step} any more")
        if is_pinned:
            (self.checkpoint(step) / PINNED).touch()
        else:
            (self.checkpoint(step) / PINNED).unlink(missing_ok=True)

    def export_of(self, step: int) -> Path:
        """The export that goes with a checkpoint."""
        return self.exports / f"{self.name}-{step:06d}.safetensors"

    def exported(self, path: str) -> Path:
        """The file of an `export` event's path: a run that was renamed has it under its own name."""
        if (self.path / path).exists():
            return self.path / path
        folder, _, file = path.rpartition("/")
        match = EXPORT.fullmatch(file)
        if folder == self.exports.name and match:
            return self.export_of(int(match.group(1)))
        return self.path / path if folder else self.result

    def origin(self) -> Origin | None:
        """Where a branch began; None for a run that is none."""
        try:
            stored = json.loads(self._origin.read_bytes())
            return Origin(str(stored["run"]), int(stored["step"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note_origin(self, origin: Origin) -> None:
        write_atomic(self._origin, json.dumps(origin._asdict()).encode())

    def last_step(self) -> int:
        """The step a resume would start from; 0 before any checkpoint."""
        return max(self.checkpoint_steps(), default=0)


def create(workspace: Path, name: str, preset_text: str) -> Run:
    """Make a new run's folder; a taken or impossible name is refused, with the way to resume.

    A run that never began gives way: the fault is mended, and the same command is given again.
    """
    check_name(name)
    run = Run(workspace / "runs" / name)
    if run.never_began():
        shutil.rmtree(run.path)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        run.path.mkdir()
    except FileExistsError:
        raise UserError(f"there is already a run called {name!r}. To go on with it: "
                        f"python -m trainer --resume {run.path}. For a new one give another --name.") from None
    try:
        run.control.mkdir()
        write_atomic(run.preset, preset_text.encode())
    except OSError:  # a full disk: the name stays free
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def open_run(path: Path) -> Run:
    """The run in an existing folder."""
    run = Run(path.resolve())
    if not run.preset.is_file():
        raise UserError(f"{path}: not a run folder (it has no preset.toml); give one such as workspace/runs/NAME, "
                        "or begin a new run with --preset")
    return run


def list_runs(workspace: Path) -> list[Run]:
    """All runs of a workspace, the newest first."""
    paths = (path.parent for path in (workspace / "runs").glob("*/preset.toml"))
    return [Run(path) for path in sorted(paths, key=_started, reverse=True)]


def free_name(workspace: Path, stem: str, reserved: Collection[str] = ()) -> str:
    """`stem` made a possible name, or the first of stem-2, stem-3 … that is neither taken nor reserved."""
    stem = re.sub(r"[^A-Za-z0-9 ._-]+", "-", stem).strip(" .-_")[:90].rstrip(" .") or "run"
    stem = f"run-{stem}" if _is_reserved(stem) else stem
    name, number = stem, 1
    while name in reserved or is_taken(workspace, name):
        number += 1
        name = f"{stem}-{number}"
    return name


def is_taken(workspace: Path, name: str) -> bool:
    """Whether `create` would refuse a name because there is a run (or anything else) of that name."""
    run = Run(workspace / "runs" / name)
    return run.path.exists() and not run.never_began()


def check_name(name: str) -> None:
    """A run's name is a folder's name on every system; `UserError` otherwise."""
    if not is_name(name):
        raise UserError(f"{name!r} cannot be a run's name: use letters, digits, '.', '_', '-' and blanks, "
                        "starting with a letter or digit, at most 100 characters")


def is_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None and name == name.rstrip(" .") and not _is_reserved(name)


def _is_reserved(name: str) -> bool:
    return name.split(".")[0].rstrip().lower() in RESERVED


def _living(last: Event, step: int, steps: int, now: float) -> State:
    quiet = now - last.get("t", now)
    if last["kind"] == "end":  # of the time before: this trainer has not said anything yet
        return State("starting", "starting", step, steps, alive=True)
    if last["kind"] == "paused":
        return State("paused", f"paused at step {step}", step, steps, alive=True)
    if quiet > SILENCE:
        return State("silent", f"no sign of life for {quiet / 60:.0f} min", step, steps, alive=True)
    if last["kind"] == "phase":
        done, of = last.get("done"), last.get("of")
        progress = f": {last['detail']}" if last.get("detail") else f" {done} of {of}" if of else ""
        return State("starting" if step == 0 else "training", f"{last.get('name', 'working')}{progress}", step, steps,
                     alive=True)
    if last["kind"] == "start":
        return State("starting", "starting", step, steps, alive=True)
    return State("training", f"training, step {step} of {steps}", step, steps, alive=True)


def _progress(events: Path, last: Event | None) -> tuple[int, int]:
    """Step and planned steps, from the newest events that say so."""
    if last is None:
        return 0, 0
    step, steps = last.get("step"), last.get("steps")
    if step is None or steps is None:
        for event in newest_first(events):
            step = event.get("step") if step is None else step
            steps = event.get("steps") if steps is None else steps
            if step is not None and steps is not None:
                break
    return step or 0, steps or 0


def _started(path: Path) -> float:
    try:
        return (path / "preset.toml").stat().st_mtime
    except OSError:
        return 0.0
