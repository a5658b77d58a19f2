"""Runs that wait for their turn, as files: `queue/0001-<run>.toml` waits, and moves on to `running/`, or `failed/`.

`0001+<run>.toml` waits to go on with a run that was begun before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from trainer import preset as presets
from trainer import run as runs
from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.run import Run
from trainer.schema import Preset

PATIENCE = 10.0  # seconds; the queue as a whole is held for milliseconds at a time
FILE = re.compile(r"(\d{1,9})([-+])(.+)\.toml")  # "+", which no run's name has: it goes on with a run that is there


class Entry(NamedTuple):
    """A file of the queue.  The preset in it is whole: its paths are absolute, its defaults filled in."""

    number: int
    name: str  # of the run
    path: Path
    resumes: bool = False  # it goes on with a run whose folder is there, and takes no new name


class Failure(NamedTuple):
    """A run that could not be trained; the queue went on without it."""

    name: str
    reason: str


class Queue:
    """The queue of a workspace.  A file is moved in one step from one folder to the next, so that no kill loses it."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.folder = workspace / "queue"
        self._running, self._failed, self._cancelled, self._locks = (
            self.folder / name for name in ("running", "failed", "cancelled", "locks"))

    def waiting(self) -> list[Entry]:
        """What has not begun, in order."""
        return _entries(self.folder)

    def begun(self) -> list[Entry]:
        """What is being trained, or was when its runner was killed."""
        return _entries(self._running)

    def names(self) -> set[str]:
        """Names of runs that are spoken for."""
        return {entry.name for entry in (*self.waiting(), *self.begun())}

    def failures(self) -> list[Failure]:
        """What failed since it was last dismissed, in order."""
        return [Failure(entry.name, _text(entry.path.with_suffix(".txt"))) for entry in _entries(self._failed)]

    def add(self, preset: Preset, name: str | None, stem: str = "run") -> Entry:
        """Put a complete preset at the end; without a name it gets the first free one after `stem`.

        Raises `UserError` for a name that is impossible or taken, by a run or in the queue.
        """
        with self._whole():
            if name is None:
                name = runs.free_name(self.workspace, stem, self.names())
            runs.check_name(name)
            if name in self.names() or runs.is_taken(self.workspace, name):
                raise UserError(f"there is already a run called {name!r}, or one waits in the queue; "
                                "choose another name")
            return self._put(name, presets.dumps(preset).encode(), resumes=False)

    def add_resume(self, run: Run) -> Entry:
        """Let a run that is over wait until it can go on.  Raises `UserError` when it waits already."""
        with self._whole():
            if run.name in self.names():
                raise UserError(f"{run.name} waits in the queue already")
            return self._put(run.name, run.preset.read_bytes(), resumes=True)

    def _put(self, name: str, preset: bytes, resumes: bool) -> Entry:
        number = max((entry.number for entry in (*self.waiting(), *self.begun())), default=0) + 1
        path = self.folder / _file(number, name, resumes)
        write_atomic(path, preset)
        return Entry(number, name, path, resumes)

    def move(self, name: str, place: int) -> None:
        """Make a waiting run the `place`th to begin (from 1; what is too far means the end).

        The files swap their numbers; a kill in between leaves each entry somewhere in the order.
        """
        with self._whole():
            entries = self.waiting()
            entry = self._find(entries, name)
            if len({other.name for other in entries}) < len(entries):
                raise UserError("two runs of one name wait in the queue; cancel one of them, then move the other")
            order = [other for other in entries if other is not entry]
            order.insert(max(0, place - 1), entry)
            numbers = _rising([other.number for other in entries])
            for number, other in zip(numbers, order):
                os.replace(other.path, self.folder / _file(number, other.name, other.resumes))

    def cancel(self, name: str) -> None:
        """Take a waiting run out; the last one can be had back."""
        with self._whole():
            entry = self._find(self.waiting(), name)
            self._cancelled.mkdir(exist_ok=True)
            for old in _entries(self._cancelled):
                old.path.unlink()
            os.replace(entry.path, self._cancelled / entry.path.name)

    def restore(self, name: str) -> None:
        """Let the run that was cancelled last wait again, where it did before."""
        with self._whole():
            entry = self._find(_entries(self._cancelled), name)
            if name in self.names() or (not entry.resumes and runs.is_taken(self.workspace, name)):
                raise UserError(f"{name} cannot wait again: there is another run of that name by now")
            os.replace(entry.path, self.folder / entry.path.name)

    def let_go(self, name: str) -> None:
        """A run that has begun is stopped for good: no runner shall take it up again."""
        for entry in self.begun():
            if entry.name == name:
                entry.path.unlink(missing_ok=True)

    def dismiss(self, name: str) -> None:
        """Forget a failure that was read."""
        entry = self._find(_entries(self._failed), name)
        entry.path.unlink(missing_ok=True)
        entry.path.with_suffix(".txt").unlink(missing_ok=True)

    def fail(self, entry: Entry, reason: str) -> None:
        """Put a begun entry aside, with what is to be told."""
        self._failed.mkdir(parents=True, exist_ok=True)
        goal = self._failed / entry.path.name
        write_atomic(goal.with_suffix(".txt"), reason.encode(errors="replace"))
        with suppress(FileNotFoundError):  # let go of meanwhile
            os.replace(entry.path, goal)

    @contextmanager
    def claim(self, has_room: Callable[[Entry], bool] = lambda entry: True) -> Iterator[Entry | None]:
        """The next entry to train, for no other runner until the block ends; None when there is none.

        First what a killed runner left half done, then the first that waits, which moves to `running/` if `has_room`
        says so; it is asked while no other runner claims anything, and all that is in `running/` has its runner.
        """
        with ExitStack() as after:
            with self._whole():
                entry = next((entry for entry in self.begun() if self._take(entry.name, after)), None)
                if entry is None and (waiting := self.waiting()) and has_room(waiting[0]):
                    entry = self._begin(waiting[0])
                    self._take(entry.name, after)
            yield entry

    @contextmanager
    def seat(self, gpu: str) -> Iterator[bool]:
        """Be the only runner of a GPU; False when there is another."""
        lock = self._seat(gpu or "cpu")
        try:
            lock.acquire(timeout=2.0, poll_interval=0.05)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def is_served(self, gpu: str | None = None) -> bool:
        """Whether a GPU (None: any) has a living runner."""
        names = ([gpu or "cpu"] if gpu is not None
                 else [path.stem.removeprefix("runner-") for path in self._locks.glob("runner-*.lock")])
        return any(self._is_seated(name) for name in names)

    def _is_seated(self, name: str) -> bool:
        try:
            with self._seat(name).acquire(timeout=0):
                return False
        except Timeout:
            return True

    def _seat(self, name: str) -> FileLock:
        self._locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self._locks / f"runner-{re.sub(r'[^A-Za-z0-9-]', '_', name)}.lock")

    def _begin(self, entry: Entry) -> Entry:
        """Move a waiting entry on; when its name was taken meanwhile it gets the next free one."""
        name = entry.name
        others = self.names() - {name} | {other.name for other in self.begun()}
        if not entry.resumes and (name in others or runs.is_taken(self.workspace, name)):
            name = runs.free_name(self.workspace, name, others)
        self._running.mkdir(parents=True, exist_ok=True)
        path = self._running / _file(entry.number, name, entry.resumes)
        os.replace(entry.path, path)
        return Entry(entry.number, name, path, entry.resumes)

    def _take(self, name: str, after: ExitStack) -> bool:
        """Lock an entry until `after` ends; False when another runner has it.  Only under the lock of the whole."""
        self._locks.mkdir(parents=True, exist_ok=True)
        path = self._locks / f"run-{name}.lock"
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        after.callback(self._free, lock, path)
        return True

    def _free(self, lock: FileLock, path: Path) -> None:
        with self._whole():  # nobody else can have opened the file to be taken away
            lock.release()
            with suppress(OSError):
                path.unlink()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        self._locks.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._locks / "queue.lock").acquire(timeout=PATIENCE, poll_interval=0.02):
                yield
        except Timeout:
            raise UserError(f"{self.folder} is held by another program for a long time; try again") from None

    def _find(self, entries: list[Entry], name: str) -> Entry:
        found = next((entry for entry in entries if entry.name == name), None)
        if found is None:
            names = ", ".join(entry.name for entry in entries) or "none"
            raise UserError(f"no run called {name[:100]!r} is there in the queue to do that with; there is: {names}")
        return found


def _entries(folder: Path) -> list[Entry]:
    found = ((FILE.fullmatch(path.name), path) for path in folder.glob("*.toml"))
    return sorted(Entry(int(match.group(1)), match.group(3), path, match.group(2) == "+") for match, path in found
                  if match and runs.is_name(match.group(3)))


def _rising(numbers: list[int]) -> list[int]:
    """The same numbers, but no two the same: of files that a person or a kill gave one number."""
    result: list[int] = []
    for number in sorted(numbers):
        result.append(max(number, result[-1] + 1) if result else number)
    return result


def _file(number: int, name: str, resumes: bool) -> str:
    return f"{number:04d}{'+' if resumes else '-'}{name}.toml"


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
