"""The trash of a data set: a hidden folder in it, from which everything can come back until it is emptied."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.datasets.arrange import list_of, relisted
from app.datasets.changes import Change, Move, content, place
from app.datasets.journal import HIDDEN
from app.paths import inside
from trainer.data import folders
from trainer.errors import UserError

FOLDER = f"{HIDDEN}/trash"
INCOMING = "incoming-"  # how folders begin in which uploads are made ready
ABANDONED = 3600.0  # seconds


def new_folder() -> str:
    """A folder in the trash for one change, relative to the data set."""
    return f"{FOLDER}/{int(time.time() * 1000):x}-{secrets.token_hex(3)}"


def listing(root: Path) -> dict[str, Any]:
    """What is in the trash, the newest first; `key` names a file to `restoring`."""
    files = [{"key": key, "name": key.partition("/")[2], "at": _thrown_away(key), "bytes": size}
             for key, size in _files(root)]
    files.sort(key=lambda file: (-float(file["at"]), str(file["name"])))
    return {"files": files, "bytes": sum(int(file["bytes"]) for file in files)}


def restoring(root: Path, keys: Sequence[str]) -> list[Change]:
    """Moves from the trash to where the files were, and to the lists of excluded images what was on them.

    Raises `UserError` for a key that is none, for a taken place, and for two files that were at the same place.
    """
    there = {key for key, _ in _files(root)}
    names: set[str] = set()
    for key in dict.fromkeys(keys):
        name = key.partition("/")[2]
        if key not in there:
            raise UserError(f"{name[:200]} is no longer in the trash")
        if os.path.lexists(place(root, name)):
            raise UserError(f"there is a {name} again; move that one away first")
        if name in names:
            raise UserError(f"two of the files were called {name}; choose one of them")
        names.add(name)
    return [*(Move(f"{FOLDER}/{key}", key.partition("/")[2]) for key in dict.fromkeys(keys)), *_excluded(root, keys)]


def _excluded(root: Path, keys: Sequence[str]) -> list[Change]:
    """Names of excluded images from the trash's lists to those of the folders that the images go back to."""
    here: dict[str, set[str]] = {}
    there: dict[str, set[str]] = {}
    for key in keys:
        trashed, _, file = f"{FOLDER}/{key}".rpartition("/")
        if file in folders.parse_excluded(content(root, list_of(trashed)) or b""):
            here.setdefault(trashed, set()).add(file)
            there.setdefault(key.partition("/")[2].rpartition("/")[0], set()).add(file)
    return [*relisted(root, here, False), *relisted(root, there, True)]


def empty(root: Path) -> dict[str, Any]:
    """Remove everything in it, for good, and what uploads have left that a kill has cut off."""
    clear_abandoned(root / HIDDEN, INCOMING)
    files = _files(root)
    count, size = 0, 0
    for _, bytes_ in files:
        count, size = count + 1, size + bytes_
    if count:
        shutil.rmtree(inside(root, FOLDER))
    return {"removed": count, "bytes": size}


def clear_abandoned(folder: Path, prefix: str) -> None:
    """Remove drafts that nobody has worked on for an hour: whoever made them was killed."""
    for draft in folder.glob(f"{prefix}*"):
        if time.time() - draft.stat().st_mtime > ABANDONED:
            shutil.rmtree(draft, ignore_errors=True)


def _files(root: Path) -> Iterator[tuple[str, int]]:
    top = root / FOLDER
    for folder, _, names in os.walk(top):
        for name in names:
            if name == folders.EXCLUDED:  # goes with the images that it names
                continue
            path = os.path.join(folder, name)
            yield os.path.relpath(path, top).replace(os.sep, "/"), os.lstat(path).st_size


def _thrown_away(key: str) -> float:
    """Unix seconds, as the folder's name tells."""
    try:
        return int(key.partition("-")[0], 16) / 1000
    except ValueError:
        return 0.0
