"""A folder that one process owns: a lock that dies with it, events out, requests in as files, and its log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout

from trainer.errors import UserError
from trainer.files import write_atomic

Request = Literal["stop", "pause", "save", "sample", "prompts"]
# Taken once, and void for the next process; "pause" lasts while its file exists, and "prompts" wait for a process
ONCE: tuple[Request, ...] = ("stop", "save", "sample")
PROBE = 0.04  # seconds: another one that only looks has let go of the lock long before

Found = TypeVar("Found")


class WorkFolder:
    """The files that every such folder has.  Knows paths, holds nothing open."""

    work = "used"  # what its process does, for the message to a second one

    def __init__(self, path: Path, log: str) -> None:
        self.path = path
        self.name = path.name
        self.events = path / "events.jsonl"
        self.log = path / log
        self.control = path / "control"
        self._lock = path / "lock"

    @contextmanager
    def hold(self, patience: float = 2.0) -> Iterator[None]:
        """Be the one process of this folder until the block ends; the system lets go of the lock if we are killed.

        Waits `patience` seconds, since a reader that looks whether its process lives holds the lock for an instant.
        Raises `UserError` when another process has it.
        """
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=patience, poll_interval=0.05)
        except Timeout:
            raise self.busy() from None
        try:
            for request in ONCE:
                self._request_file(request).unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def is_held(self) -> bool:
        """Whether its process is alive."""
        if not self._lock.exists():
            return False
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=PROBE, poll_interval=PROBE / 8)
        except Timeout:
            return True
        except OSError:  # a read-only folder: nobody works there
            return False
        lock.release()
        return False

    def look(self, read: Callable[[], Found]) -> tuple[Found, bool]:
        """What `read` finds among its files, and whether its process is alive; of one that is not, its last words too.

        A process writes its last words before it lets go of the lock, and both may come between `read` and the look at
        the lock.  What was found is then not how things ended, so it is read again.
        """
        found, held = read(), self.is_held()
        if found and not held:
            found, held = read(), self.is_held()
        return found, held

    def busy(self) -> UserError:
        """What a second process is told."""
        return UserError(f"{self.path} is being {self.work} by another process; stop that one first, "
                         "or wait for it to end")

    def request(self, request: Request, content: dict[str, Any] | list[str] | None = None) -> None:
        """Ask its process for something; `content` is for "sample" ({"prompts": …}) and "prompts" (a list)."""
        write_atomic(self._request_file(request), b"" if content is None else json.dumps(content).encode())

    def withdraw(self, request: Request) -> None:
        """Take a request back: how a paused run goes on."""
        self._request_file(request).unlink(missing_ok=True)

    def asked(self, request: Request) -> bool:
        """Whether a request is waiting; a few microseconds."""
        return self._request_file(request).exists()

    def take(self, request: Request) -> dict[str, Any] | None:
        """Take a one-time request: its content ({} when it has none), or None when nobody asked."""
        content = self.take_text(request)
        if content is None:
            return None
        try:
            data = json.loads(content) if content.strip() else {}
        except ValueError:
            return {}
        return data if isinstance(data, dict) else {}

    def take_text(self, request: Request) -> str | None:
        """Take a request as it was written; None when nobody asked."""
        file = self._request_file(request)
        try:
            content = file.read_bytes()
            file.unlink()
        except OSError:
            return None
        return content.decode(errors="replace")

    def log_tail(self, lines: int = 30) -> str:
        """The end of its log."""
        try:
            with open(self.log, "rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 65536))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _request_file(self, request: Request) -> Path:
        return self.control / request
