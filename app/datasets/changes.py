"""The two changes that a data set's files can undergo, both with their way back: new content, and another place."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.paths import inside
from trainer.errors import UserError
from trainer.files import clear_remains, write_all


@dataclass(frozen=True)
class Write:
    """A file's content before and after, None where there is no file; `name` is relative to the data set."""

    name: str
    before: bytes | None
    after: bytes | None

    def reverse(self) -> Write:
        return Write(self.name, self.after, self.before)


@dataclass(frozen=True)
class Move:
    """A file's place before and after, both relative to the data set."""

    name: str
    to: str

    def reverse(self) -> Move:
        return Move(self.to, self.name)


Change = Write | Move


def end_of(change: Change) -> str:
    """The name of the file that a change leaves."""
    return change.to if isinstance(change, Move) else change.name


def place(root: Path, name: str) -> Path:
    """Where a name of a data set stands; a link is the link itself and not what it points to.  Raises `UserError`."""
    resolved = inside(root, name)  # refuses what leads out, by links too
    parent, _, last = name.rpartition("/")
    return (inside(root, parent) if parent else root.resolve()) / last if last not in ("", ".") else resolved


def content(root: Path, name: str) -> bytes | None:
    """A file's bytes, None when there is none.  Raises `UserError` when it cannot be read."""
    path = inside(root, name)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def obstacle(root: Path, change: Change) -> str:
    """Why a change cannot be made to what is on the disk now; "" when it can, or is made already."""
    try:
        if isinstance(change, Write):
            return "" if content(root, change.name) in (change.before, change.after) else "it was changed outside since"
        source, end = place(root, change.name), place(root, change.to)
    except UserError as error:
        return str(error)
    is_there, is_taken = os.path.lexists(source), os.path.lexists(end)
    if is_there and is_taken:
        return f"{change.to} is there already"
    return "" if is_there or is_taken else f"{change.name} is gone"


def make(root: Path, changes: Sequence[Change]) -> None:
    """Bring about every change that is not made yet and has no obstacle; repeating it does no harm.

    Raises `OSError` with some made and some not.
    """
    for change in changes:
        if isinstance(change, Move) and not obstacle(root, change):
            source, end = place(root, change.name), place(root, change.to)
            if os.path.lexists(source):
                end.parent.mkdir(parents=True, exist_ok=True)
                os.rename(source, end)
    new: dict[Path, bytes] = {}
    for change in changes:
        if isinstance(change, Write) and change.before != change.after and content(root, change.name) == change.before:
            if change.after is None:
                inside(root, change.name).unlink()
            else:
                new[inside(root, change.name)] = change.after
    write_all(new)


def clear_half_written(root: Path, changes: Iterable[Change]) -> None:
    """Take away new contents that a kill has kept from getting their names."""
    names: dict[Path, list[str]] = {}
    for change in changes:
        if isinstance(change, Write) and (path := inside(root, change.name)).parent.is_dir():
            names.setdefault(path.parent, []).append(path.name)
    for folder, own in names.items():
        clear_remains(folder, own)


def clear_folders(root: Path, changes: Iterable[Change]) -> None:
    """Take away folders that moving files has emptied, up to the data set."""
    top = root.resolve()
    for change in changes:
        if isinstance(change, Move):
            folder = place(root, change.name).parent
            while folder != top and top in folder.parents:
                try:
                    folder.rmdir()
                except OSError:  # not empty
                    break
                folder = folder.parent


def to_json(change: Change) -> list[Any]:
    if isinstance(change, Move):
        return ["move", change.name, change.to]
    return ["write", change.name, _packed(change.before), _packed(change.after)]


def from_json(row: list[Any]) -> Change:
    if row[0] == "move":
        return Move(row[1], row[2])
    return Write(row[1], _unpacked(row[2]), _unpacked(row[3]))


def _packed(data: bytes | None) -> Any:
    """Text as text, so that a person can read a journal; anything else as base64."""
    try:
        return data if data is None else data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data or b"").decode()}


def _unpacked(value: Any) -> bytes | None:
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else base64.b64decode(value["base64"])
