"""Starts trainers as a person at a shell would, posts requests to them, and lists runs with their state."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Literal, NamedTuple

from app.paths import Places
from trainer import branch as branches
from trainer import preset as presets
from trainer import run as runs
from trainer import shelf
from trainer.detached import TRAINER, Launch, start_detached
from trainer.errors import UserError
from trainer.queue import Queue
from trainer.run import Run, State

RUNNER_CHECK = 5.0  # seconds between two looks whether somebody trains what waits
SHARED_FOR = 0.5  # seconds for which all open tabs share one listing

Order = Literal["stop", "pause", "continue", "save", "sample", "prompts"]
QueueOrder = Literal["up", "down", "cancel", "restore", "dismiss"]


class Row(NamedTuple):
    """A run in the list."""

    name: str
    state: State
    started: float  # unix seconds


class Jobs:
    """The trainers of one workspace.  Nothing depends on this object living: runs go on without it."""

    def __init__(self, places: Places, trainer: tuple[str, ...] = TRAINER) -> None:
        self.places = places
        self.queue = Queue(places.workspace)
        self.trainer = trainer
        self._queue_starter: Launch | None = None
        self._looked_after = 0.0
        self._launches: dict[str, Launch] = {}
        self._ended: dict[str, tuple[object, State]] = {}  # state of runs that are over, by what their files say
        self._listing: tuple[float, list[Row]] = (0.0, [])
        self._lock = threading.Lock()

    def start(self, preset: Path, name: str, queued: bool = False) -> bool:
        """Begin a new run, or let it wait while another one is on, or when that is wished; returns whether it waits.

        A name that is taken or impossible is refused.
        """
        with self._lock:
            self.refuse_taken(name)
            waits = queued or bool(self.queue.names()) or any(row.state.alive for row in self._list())
            if waits:
                self.queue.add(presets.load(preset), name)
                self._launches.pop(name, None)  # one of this name may have failed before
                self._listing = (0.0, [])
            else:
                self._launch(name, ["--preset", str(preset), "--name", name, "--workspace", str(self.places.workspace)])
        self.serve_queue()
        return waits

    def serve_queue(self) -> None:
        """See to it that what waits is trained, by processes that need this app no more than a trainer does."""
        with self._lock:
            is_starting = self._queue_starter is not None and self._queue_starter.is_running
            if is_starting or not self.queue.names() or self.queue.is_served():
                return
            self._queue_starter = start_detached([*self.trainer, "queue", "--workspace", str(self.places.workspace)],
                                                 self.places.logs / "queue.log")

    def order_queue(self, name: str, order: QueueOrder) -> None:
        """Change what waits, or forget a failure."""
        names = [entry.name for entry in self.queue.waiting()]
        if order in ("up", "down"):
            place = names.index(name) + 1 if name in names else 1
            self.queue.move(name, place - 1 if order == "up" else place + 1)
        elif order == "cancel":
            self.queue.cancel(name)
        elif order == "restore":
            self.queue.restore(name)
        else:
            self.queue.dismiss(name)
        self.serve_queue()

    def refuse_taken(self, name: str) -> None:
        """`UserError` for a name that no new run can have."""
        runs.check_name(name)
        if runs.is_taken(self.places.workspace, name) or self._is_starting(name) or name in self.queue.names():
            raise UserError(f"there is already a run called {name!r}; choose another name")

    def resume(self, run: Run) -> bool:
        """Go on with a run that stopped, failed or was killed, or let it wait while another one is on.

        Returns whether it waits.
        """
        with self._lock:
            if self._is_starting(run.name) or run.is_held():
                raise UserError(f"{run.name} is already being trained")
            run.withdraw("pause")  # whoever asks to resume does not want it to wait at once
            if self._failure(run.name):
                self.queue.dismiss(run.name)
            waits = bool(self.queue.names()) or any(row.state.alive for row in self._list())
            if waits:
                self.queue.add_resume(run)
                self._launches.pop(run.name, None)
                self._listing = (0.0, [])
            else:
                self._launch(run.name, ["--resume", str(run.path)])
        self.serve_queue()
        return waits

    def branch(self, origin: Run, step: int, name: str, changes: list[str]) -> str:
        """Begin a new run from a checkpoint of another one; returns its name.

        `changes` are lines of key = value.  Raises `UserError` for one that is wrong, or that a branch cannot have.
        """
        preset = branches.preset_of(origin, ["=".join(part.strip() for part in line.split("=", 1)) for line in changes])
        if name:
            self.refuse_taken(name)
        run = branches.begin(self.places.workspace, origin, step, preset, name or None)
        self.resume(run)
        return run.name

    def rename(self, run: Run, new: str) -> str:
        """Give a run that is over another name."""
        with self._lock:
            if self._is_starting(run.name):
                raise UserError(f"{run.name} is still starting; stop it first")
            renamed = shelf.rename(self.places.workspace, run, new)
            self._forget(run.name)
            return renamed.name

    def delete(self, run: Run) -> str:
        """Move a run that is over to the trash; returns what `restore` takes."""
        with self._lock:
            if self._is_starting(run.name):
                raise UserError(f"{run.name} is still starting; stop it first")
            entry = shelf.delete(self.places.workspace, run)
            self._forget(run.name)
            return entry

    def restore(self, entry: str) -> str:
        """Have a run back from the trash; returns its name."""
        with self._lock:
            run = shelf.restore(self.places.workspace, entry)
            self._listing = (0.0, [])
            return run.name

    def _forget(self, name: str) -> None:
        self._launches.pop(name, None)
        self._ended.pop(name, None)
        self._listing = (0.0, [])

    def order(self, run: Run, order: Order, prompts: list[str]) -> None:
        """Post a request to a living trainer, by file; other prompts may wait for the next start."""
        if order == "prompts":
            if not prompts:
                raise UserError("give at least one prompt")
            run.request("prompts", prompts)
            return
        if not run.is_held():
            raise UserError(f"{run.name} is still starting; ask again in a moment" if self._is_starting(run.name)
                            else f"{run.name} is not being trained at the moment")
        if order == "continue":
            run.withdraw("pause")
        elif order == "sample" and prompts:
            run.request("sample", {"prompts": prompts})
        else:
            run.request(order)
        if order == "stop":
            self.queue.let_go(run.name)

    def state(self, run: Run) -> State:
        """A run's state; that of a run which is over is worked out once."""
        held = run.is_held()
        if held:
            return run.state()
        if waiting := self._waiting(run.name):
            known = run.state()
            return State("waiting", waiting, known.step, known.steps)
        launch = self._launches.get(run.name)
        if launch and launch.is_running:
            old = run.state()
            return State("starting", "starting the trainer", old.step, old.steps, alive=True)
        seen = (_stamp(run.events), _stamp(run.checkpoints))
        if self._ended.get(run.name, (None,))[0] != seen:
            self._ended[run.name] = seen, run.state()
        return self._ended[run.name][1]

    def early_end(self, name: str) -> str:
        """What a trainer said that died before it wrote an event, or why the queue gave its run up; else ""."""
        launch = self._launches.get(name)
        if launch is None:
            return self._failure(name)
        if launch.is_running or launch.process.returncode == 0:
            return ""
        events = self.places.runs / name / "events.jsonl"
        said_more = events.exists() and events.stat().st_mtime >= launch.at
        return "" if said_more else launch.last_words()

    def pending(self, name: str) -> State | None:
        """The state of a run that has no folder (yet): its trainer is starting, or could not."""
        launch = self._launches.get(name)
        if launch is None:
            return self._queued(name)
        if launch.is_running:
            return State("starting", "starting the trainer", alive=True)
        return State("failed", "did not start")

    def _queued(self, name: str) -> State | None:
        """The state of a run that the queue alone knows."""
        if waiting := self._waiting(name):
            return State("waiting", waiting)
        if any(entry.name == name for entry in self.queue.begun()):
            return State("starting", "starting the trainer", alive=True)
        return State("failed", "did not start") if self._failure(name) else None

    def _waiting(self, name: str) -> str:
        """Where a run stands in the queue, in words; "" when it does not wait."""
        names = [entry.name for entry in self.queue.waiting()]
        return f"waits in the queue: place {names.index(name) + 1} of {len(names)}" if name in names else ""

    def _failure(self, name: str) -> str:
        return next((failure.reason for failure in self.queue.failures() if failure.name == name), "")

    def listing(self) -> list[Row]:
        """All runs, the newest first; trainers that have no folder yet are there too."""
        if time.monotonic() - self._looked_after > RUNNER_CHECK:  # its runner may have been killed
            self._looked_after = time.monotonic()
            self.serve_queue()
        with self._lock:
            at, rows = self._listing
            if time.monotonic() - at > SHARED_FOR:
                rows = self._list()
                self._listing = time.monotonic(), rows
            return rows

    def _list(self) -> list[Row]:
        begun = {entry.name: _seconds(entry.path) for entry in self.queue.begun()}  # first: what ends now has a folder
        rows = [Row(run.name, self.state(run), _seconds(run.preset)) for run in self.places.list_runs()]
        there = {row.name for row in rows}
        told = begun | {name: launch.at for name, launch in self._launches.items()}
        waiting = [Row(name, state, at) for name, at in told.items()
                   if name not in there and (state := self.pending(name))]
        return sorted(waiting, key=lambda row: -row.started) + rows

    def _is_starting(self, name: str) -> bool:
        return name in self._launches and self._launches[name].is_running

    def _launch(self, name: str, arguments: list[str]) -> None:
        self._launches[name] = start_detached([*self.trainer, *arguments], self.places.logs / f"{name}.log")
        self._listing = (0.0, [])


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _seconds(path: Path) -> float:
    return _stamp(path)[0] / 1e9
