"""Undo and redo of every change to a data set, on the disk beside it: a kill at any moment loses and halves nothing.

`.studio/journal.jsonl` in the data set's folder holds, a line each: the intention to make, undo or redo a change, with
every byte of text before and after; then that it is made (`end`) or was taken back (`abort`).  An intention without its
end is carried out by whoever opens the journal next.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from app.datasets import changes as disk
from app.datasets.changes import Change
from trainer.errors import UserError
from trainer.events import heal
from trainer.files import write_atomic

HIDDEN = ".studio"  # in the data set's folder; the trainer passes hidden names over
LIMIT = 64_000_000  # bytes of a journal; beyond, what is old is forgotten
PATIENCE = 30.0  # seconds that another program may take for its change

Header = dict[str, Any]


class Changed(UserError):
    """Files are not as they were when the change was asked for or made; `files` has (name, reason)."""

    def __init__(self, files: Sequence[tuple[str, str]]) -> None:
        listed = "; ".join(f"{name}: {reason}" for name, reason in files[:5])
        super().__init__(listed + (f"; and {len(files) - 5} more" if len(files) > 5 else ""))
        self.files = list(files)


@dataclass
class Entry:
    """One change of one or many files."""

    id: int
    what: str
    offset: int  # of its line in the journal
    skipped: set[int] = field(default_factory=set)  # positions that an undo or redo had to leave as they were


class Done(NamedTuple):
    """An entry that was just made, undone or redone, and the changes that this meant."""

    entry: Entry
    changes: list[Change]


class Journal:
    """The journal of one data set, for several threads and several processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / HIDDEN / "journal.jsonl"
        self.note = ""  # what was found half done, in a sentence
        self._mutex = threading.RLock()
        self._lock = FileLock(root / HIDDEN / "lock", thread_local=False)
        self._kept = 0  # bytes that the last compaction left: more than the limit after a very large change
        self._forget()
        if self.path.exists():
            with suppress(UserError), self.held():  # a folder that cannot be written can still be looked at
                pass

    # What there is

    def next_undo(self) -> Entry | None:
        return self._made[-1] if self._made else None

    def next_redo(self) -> Entry | None:
        return self._undone[-1] if self._undone else None

    # What can be done

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep all others from changing the data set; what they have done so far is known inside.

        Raises `UserError` when the folder cannot be written, or another program does not let go of it.
        """
        with self._mutex:
            is_outermost = not self._lock.is_locked
            try:
                self.path.parent.mkdir(exist_ok=True)
                self._lock.acquire(timeout=PATIENCE)
            except Timeout:
                raise UserError(f"{self.root} is being changed by another program; try again in a moment") from None
            except OSError as error:
                raise UserError(f"{self.root} cannot be written ({error.strerror}); copy the data set into the "
                                "workspace to change it") from None
            try:
                if is_outermost:
                    self._catch_up()
                yield
            finally:
                self._lock.release()

    def do(self, what: str, changes: Sequence[Change]) -> Done:
        """Make changes as one entry.

        Raises `Changed`, with nothing done, when files are not as they were seen, and `UserError` for two changes that
        end in the same file: one of them would be lost, and undo could not tell which.
        """
        ends = Counter(disk.end_of(change) for change in changes)
        if repeated := sorted(name for name, count in ends.items() if count > 1):
            raise UserError(f"two of the files would be called {repeated[0]}; nothing was changed")
        with self.held():
            blocked = [(change.name, reason) for change in changes if (reason := disk.obstacle(self.root, change))]
            if blocked:
                raise Changed(blocked)
            number = 1 + max((entry.id for entry in [*self._made, *self._undone]), default=0)
            header = {"kind": "do", "id": number, "what": what, "at": round(time.time(), 3),  # for who reads the file
                      "files": len(changes)}
            self._carry_out(header, changes, [disk.to_json(change) for change in changes])
            return Done(self._made[-1], list(changes))

    def undo(self, skip_changed: bool = False) -> Done | None:
        """Take back the newest entry; None when there is none.

        Raises `Changed`, with nothing done, when files were changed outside since; with `skip_changed` those are left
        as they are, and all others are put back.
        """
        with self.held():
            return self._turn("undo", self.next_undo(), skip_changed)

    def redo(self, skip_changed: bool = False) -> Done | None:
        """Make the entry again that was undone last; as `undo`."""
        with self.held():
            return self._turn("redo", self.next_redo(), skip_changed)

    def _turn(self, kind: str, entry: Entry | None, skip_changed: bool) -> Done | None:
        if entry is None:
            return None
        changes = self._directed(kind, entry, set())
        blocked = {position: (change.name, reason) for position, change in changes
                   if (reason := disk.obstacle(self.root, change))}
        if blocked and not skip_changed:
            raise Changed(list(blocked.values()))
        wanted = [change for position, change in changes if position not in blocked]
        self._carry_out({"kind": kind, "id": entry.id, "skip": sorted(blocked)}, wanted)
        return Done(entry, wanted)

    # How it is done

    def _carry_out(self, header: Header, changes: Sequence[Change], rows: list[Any] | None = None) -> None:
        """Write the intention down, make the changes, write the end down; or take all of it back."""
        self._take(header, self._append(header, rows))
        try:
            self._make(header["kind"], changes)
        except OSError as error:
            disk.make(self.root, [change.reverse() for change in reversed(changes)])
            self._close("abort")
            raise UserError(f"{error.filename or self.root}: {error.strerror}; nothing was changed") from None
        self._close("end")

    def _make(self, kind: str, changes: Sequence[Change]) -> None:
        disk.make(self.root, changes)
        disk.clear_folders(self.root, [change for change in changes if kind == "undo" or change.name[:7] == HIDDEN])

    def _close(self, kind: str) -> None:
        self._take({"kind": kind}, self._append({"kind": kind}, sync=False))

    def _directed(self, kind: str, entry: Entry, skip: set[int]) -> list[tuple[int, Change]]:
        """The changes that doing or undoing an entry means, with their positions in it."""
        with open(self.path, "rb") as file:
            file.seek(entry.offset)
            rows = json.loads(file.readline().partition(b"\t")[2])
        own = [(i, disk.from_json(row)) for i, row in enumerate(rows) if i not in entry.skipped | skip]
        return [(i, change.reverse()) for i, change in reversed(own)] if kind == "undo" else own

    # The file

    def _append(self, header: Header, rows: list[Any] | None = None, sync: bool = True) -> int:
        """Add a line; where it begins.  Raises `UserError`, with nothing added, when the disk is full."""
        line = _line(header, rows)
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.seek(0, os.SEEK_END)
                if file.write(line) < len(line):
                    file.truncate(start)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fsync(file.fileno())
                self._seen = (os.fstat(file.fileno()).st_ino, start + len(line))
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; nothing was changed") from None
        return start

    def _catch_up(self) -> None:
        """Read what others have written since, finish what a kill has cut off, and forget what is too old."""
        if self.path.exists():
            heal(self.path)
        self._read()
        if self._pending:
            kind, entry, skip = self._pending
            changes = [change for _, change in self._directed(kind, entry, skip)]
            disk.clear_half_written(self.root, changes)
            self._make(kind, changes)
            self._close("end")
            self.note = f"an interrupted change was completed: {'undo of ' if kind == 'undo' else ''}{entry.what}"
        if self._seen[1] > max(LIMIT, 2 * self._kept):
            self._compact()

    def _read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._seen[0] or facts.st_size < self._seen[1]:
                    self._forget()
                offset = file.seek(self._seen[1])
                for line in file:
                    if header := _header(line):
                        self._take(header, offset)
                    offset += len(line)
                self._seen = (facts.st_ino, offset)
        except FileNotFoundError:
            self._forget()

    def _forget(self) -> None:
        self._made: list[Entry] = []
        self._undone: list[Entry] = []
        self._pending: tuple[str, Entry, set[int]] | None = None
        self._seen = (0, 0)  # inode and length of the file, as far as it is read

    def _take(self, header: Header, offset: int) -> None:
        """What a line means."""
        kind = header["kind"]
        if kind == "do":
            entry = Entry(header["id"], header["what"], offset, set(header.get("skip", ())))
            self._pending = kind, entry, set()
        elif kind in ("undo", "redo"):
            stack = self._made if kind == "undo" else self._undone
            if stack and stack[-1].id == header["id"]:
                self._pending = kind, stack[-1], set(header["skip"])
        elif self._pending and kind == "end":
            self._end(*self._pending)
        if kind in ("end", "abort"):
            self._pending = None

    def _end(self, kind: str, entry: Entry, skip: set[int]) -> None:
        entry.skipped |= skip
        if kind == "do":
            self._undone.clear()
            self._made.append(entry)
        elif kind == "undo":
            self._undone.append(self._made.pop())
        else:
            self._made.append(self._undone.pop())

    def _compact(self) -> None:
        """Write the file anew with the entries that are the next to be undone, and the next to be made again."""
        with open(self.path, "rb") as file:
            made, undone = _next_lines(file, self._made), _next_lines(file, self._undone)
        turned = self._undone[len(self._undone) - len(undone):]
        turns = [_line({"kind": "undo", "id": entry.id, "skip": []}) + _line({"kind": "end"}) for entry in turned]
        write_atomic(self.path, b"".join([*reversed(made), *undone, *turns]))
        self._forget()
        self._read()
        self._kept = self._seen[1]


def _next_lines(file: BinaryIO, stack: Sequence[Entry]) -> list[bytes]:
    """The lines of a stack's last entries, the last first, that come to a third of the limit. The largest does not
    count: nobody could take back by hand what it did, nor reach what is beyond it."""
    lines: list[bytes] = []
    size = largest = 0
    for entry in reversed(stack):
        file.seek(entry.offset)
        header, _, rows = file.readline().partition(b"\t")
        size, largest = size + len(rows), max(largest, len(rows))
        if size - largest > LIMIT // 3:
            break
        told = json.loads(header) | {"skip": sorted(entry.skipped)}
        lines.append(_dumps(told) + b"\t" + rows + _line({"kind": "end"}))
    return lines


def _dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _line(header: Header, rows: list[Any] | None = None) -> bytes:
    """The header as JSON; behind a tab the rows as JSON, with their checksum in the header."""
    if rows is None:
        return _dumps(header) + b"\n"
    body = _dumps(rows)
    return _dumps(header | {"crc32": zlib.crc32(body)}) + b"\t" + body + b"\n"


def _header(line: bytes) -> Header | None:
    """What a line's header says; None for a line that is not whole."""
    start, _, body = line.partition(b"\t")
    try:
        header = json.loads(start)
        is_whole = line.endswith(b"\n") and (header["kind"] != "do" or header["crc32"] == zlib.crc32(body[:-1]))
    except (ValueError, TypeError, KeyError):
        return None
    return header if is_whole else None
