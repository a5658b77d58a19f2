"""Makes thumbnails in the background and keeps them, with the images' facts, under the workspace."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.datasets.facts import SIDE, Facts
from trainer.files import write_atomic

HOME = Path(__file__).resolve().parent.parent.parent  # where `-m app.datasets.facts` is found
WORKERS = max(1, min(4, (os.cpu_count() or 2) // 2))
IDLE = 20.0  # seconds without work after which a worker's memory is given back
PAUSE = 1.0  # seconds until a worker that could not be started is tried again
TRIES = 2  # a worker may die of something else than the image
SOON, LATER = 0, 1  # what somebody is looking at, and all the rest

_DEATH = Facts(trouble="broken: reading it ends the program that reads it", passing=True)

Stamp = tuple[int, int]  # modification time in nanoseconds, size in bytes


@dataclass(frozen=True)
class Wanted:
    """One image to look at."""

    path: Path
    stamp: Stamp
    side: int
    done: Callable[[Facts], None]


class Workshop:
    """A few processes that look at images; threads here only wait for them."""

    def __init__(self, folder: Path, workers: int = WORKERS) -> None:
        self.folder = folder
        self._most = workers
        self._queue: queue.PriorityQueue[tuple[int, int, Wanted]] = queue.PriorityQueue()
        self._count = itertools.count()
        self._threads = 0
        self._is_open = True
        self._waiting: dict[Path, int] = {}  # thumbnail -> the urgency it is waited for with
        self._lock = threading.Lock()

    def file_of(self, path: Path, stamp: Stamp, side: int = SIDE) -> Path:
        """Where the thumbnail of that file, as it was then, stands when it is made."""
        key = hashlib.sha256(f"{path}\0{stamp[0]}\0{stamp[1]}\0{side}".encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / key[:2] / f"{key[2:34]}.webp"

    def want(self, path: Path, stamp: Stamp, done: Callable[[Facts], None], urgency: int = LATER,
             side: int = SIDE) -> None:
        """Have an image looked at; `done` gets its facts in another thread."""
        target = self.file_of(path, stamp, side)
        with self._lock:
            if not self._is_open:
                return
            if self._waiting.get(target, LATER + 1) > urgency:
                self._waiting[target] = urgency
                self._queue.put((urgency, next(self._count), Wanted(path, stamp, side, done)))
            if self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, daemon=True, name="thumbnails").start()

    def close(self) -> None:
        """Let the workers end; what is not made yet is made at another time."""
        self._is_open = False

    def _work(self) -> None:
        """Feed one worker until there is nothing to do for a while."""
        worker: subprocess.Popen[str] | None = None
        try:
            while self._is_open and (wanted := self._next()):
                facts = None
                for _ in range(TRIES):
                    worker = self._ready(worker)
                    facts = self._look(worker, wanted) if worker else None
                    if facts is not _DEATH:
                        break
                if facts and (self._is_open or facts is not _DEATH):  # at the app's end workers are ended, too
                    wanted.done(facts)
        except BaseException:
            with self._lock:
                self._threads -= 1  # another one begins with what is wanted next
            raise
        finally:
            if worker:
                worker.communicate()  # its end of input is its end

    def _ready(self, worker: subprocess.Popen[str] | None) -> subprocess.Popen[str] | None:
        """The worker, or a new one if it has ended; None when the app ends before there is one."""
        while self._is_open and (worker is None or worker.poll() is not None):
            try:
                return _start()
            except OSError:  # the system has no memory or no process to give: just now, mostly
                time.sleep(PAUSE)
        return worker

    def _next(self) -> Wanted | None:
        while True:
            try:
                urgency, _, wanted = self._queue.get(timeout=IDLE)
            except queue.Empty:
                with self._lock:
                    if not self._queue.empty():
                        continue
                    self._threads -= 1
                    return None
            with self._lock:
                target = self.file_of(wanted.path, wanted.stamp, wanted.side)
                if self._waiting.get(target) == urgency:  # else it was asked for again, more urgently
                    del self._waiting[target]
                    return wanted

    def _look(self, worker: subprocess.Popen[str], wanted: Wanted) -> Facts | None:
        """What the worker says, `_DEATH` when it dies of it; None when the disk does not take the thumbnail."""
        assert worker.stdin and worker.stdout
        target = self.file_of(wanted.path, wanted.stamp, wanted.side)
        asked = {"path": os.fspath(wanted.path), "thumbnail": os.fspath(target), "side": wanted.side}
        try:
            worker.stdin.write(json.dumps(asked) + "\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            return None if "failed" in answer else Facts(**answer)
        except (OSError, ValueError):  # the decoder took the process down with it
            worker.kill()
            worker.wait()  # so that the next image does not go to a program that is ending
            return _DEATH


def _start() -> subprocess.Popen[str]:
    """A worker out of reach of the terminal: a Ctrl-C that is meant for the app says nothing of an image."""
    flags = 0 if sys.platform != "win32" else subprocess.CREATE_NEW_PROCESS_GROUP
    return subprocess.Popen([sys.executable, "-m", "app.datasets.facts"], cwd=HOME, text=True, encoding="utf-8",
                            bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            start_new_session=sys.platform != "win32", creationflags=flags)


class FactsFile:
    """The facts of one data set's images, kept over restarts: a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Stamp, Facts]] = {}
        lines = 0
        for line in _lines(path):
            try:
                name, modified, size, facts = json.loads(line)
                self._known[name] = (modified, size), Facts(**facts)
                lines += 1
            except (ValueError, TypeError):  # torn by a kill, or of another version: it is looked at again
                continue
        if lines > 2 * len(self._known) + 1000:
            write_atomic(path, b"".join(_row(name, *known) for name, known in self._known.items()))

    def get(self, name: str, stamp: Stamp) -> Facts | None:
        known = self._known.get(name)
        return known[1] if known and known[0] == stamp else None

    def put(self, name: str, stamp: Stamp, facts: Facts) -> None:
        with self._lock:
            self._known[name] = stamp, facts
            if facts.passing:
                return
            with suppress(OSError):  # a full disk: it is found again at the next start
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab", buffering=0) as file:
                    file.write(_row(name, stamp, facts))


def _row(name: str, stamp: Stamp, facts: Facts) -> bytes:
    row: list[Any] = [name, *stamp, asdict(facts)]
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError:
        return []
