"""Preset files: the shipped ones, which are only read, and one's own, with a trash."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from app import form
from app.paths import Places, can_be_sent, inside
from trainer import preset
from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.run import check_name

SHELVES = ("shipped", "own")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,79}")
THROWN = re.compile(r"\d{8}-\d{6}-\d{6}-(?P<name>.+)\.toml")  # a file in the trash
_writing = threading.Lock()  # two people may save at once


class Changed(UserError):
    """The file is not the one that the page had."""


def folder_of(places: Places, shelf: Any) -> Path:  # noqa: ANN401
    return preset.SHIPPED if shelf == "shipped" else places.presets


def names(places: Places) -> dict[str, list[str]]:
    """The names on both shelves."""
    return {shelf: sorted((path.stem for path in folder_of(places, shelf).glob("*.toml") if can_be_sent(path.name)),
                          key=str.lower) for shelf in SHELVES}


def find(places: Places, shelf: str, name: str) -> Path:
    """The file of a preset.  Raises `UserError` when there is none."""
    folder = folder_of(places, shelf)
    file = inside(folder, f"{name}.toml")
    if not file.is_file() or file.parent != folder.resolve():
        raise UserError(f"there is no preset {name[:100]!r} in {folder}")
    return file


def tag(text: str) -> str:
    """What a file's text is known by, so that a page can tell whether it changed meanwhile."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Saved(NamedTuple):
    """A preset's text with its paths settled, and what the file it took the place of is called in the trash, or ""."""

    text: str
    thrown: str = ""


def save(places: Places, name: str, text: str, shelf: str, known: str = "", replace: bool = False) -> Saved | None:
    """Write one's own preset; None when there is one of that name already.

    known: the tag of the file that the page has; when the file is another one by now, `Changed` is raised.  With
    `replace` neither hinders, and what was there goes to the trash.
    """
    kept = None
    file = _own(places, name)
    text = form.settled(text, folder_of(places, shelf)) if shelf != "own" else text
    with _writing:
        if file.exists() and replace:
            kept = _keep(places, file)
        elif file.exists():
            if not known:
                return None
            if tag(preset.read_text(file)) != known:
                raise Changed(f"{name} was changed by somebody else since you opened it")
        try:
            preset.save(file, text)
        except (UserError, OSError):
            if kept:
                kept.unlink()
            raise
    return Saved(text, kept.name if kept else "")


def delete(places: Places, name: str) -> str:
    """Move one's own preset to the trash; returns what `restore` takes."""
    file = find(places, "own", name)
    with _writing:
        thrown = _in_trash(places, file)
        os.replace(file, thrown)
    return thrown.name


class Restored(NamedTuple):
    """A preset that is back, and what the one of its name that gave way is called in the trash, or ""."""

    name: str
    thrown: str = ""


def restore(places: Places, thrown: str, replace: bool = False) -> Restored:
    """Bring a preset back from the trash.  One that has its name by now goes there with `replace`, and else hinders."""
    match = THROWN.fullmatch(thrown)
    source = inside(_trash(places), thrown)
    if not match or not source.is_file() or source.parent != _trash(places).resolve():
        raise UserError(f"there is no deleted preset {thrown[:100]!r} in {_trash(places)}")
    goal = _own(places, match["name"])
    with _writing:
        if goal.exists() and not replace:
            raise UserError(f"there is another preset called {goal.stem} by now; rename that one first")
        gone = _keep(places, goal).name if goal.exists() else ""
        os.replace(source, goal)
    return Restored(goal.stem, gone)


def _keep(places: Places, file: Path) -> Path:
    """Copy a file that is about to be replaced into the trash."""
    kept = _in_trash(places, file)
    write_atomic(kept, file.read_bytes())
    return kept


def _in_trash(places: Places, file: Path) -> Path:
    """Where a preset comes to lie in the trash."""
    _trash(places).mkdir(parents=True, exist_ok=True)
    return _trash(places) / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{file.stem}.toml"


def _own(places: Places, name: str) -> Path:
    if not NAME.fullmatch(name):
        raise UserError("a preset's name has letters, digits, '_', '-' and blanks, at most 80 of them")
    check_name(name)
    return inside(places.presets, f"{name}.toml")


def _trash(places: Places) -> Path:
    return places.workspace / "trash" / "presets"
