"""Puts runs in order: gives one another name, moves it to the trash and back, and empties the trash."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from trainer import run as runs
from trainer import sweep
from trainer.errors import UserError
from trainer.queue import Queue
from trainer.run import EXPORT, Run

ENTRY = re.compile(r"(\d{8}-\d{6})(?:\.\d+)?-(.+)")  # a run in the trash: when it came there, its name
STAMP = "%Y%m%d-%H%M%S"


class Trashed(NamedTuple):
    """A run in the trash; `deleted` is unix seconds."""

    entry: str
    name: str
    deleted: float
    bytes: int


def rename(workspace: Path, run: Run, new: str) -> Run:
    """Give a run another name; its result and its exports, which bear the name, get it too, and its comparisons.

    The folder moves in one step.  A kill after it leaves files with the old name, which `settle` renames when the run
    is trained or renamed again.  Raises `UserError` for a living or waiting run, and for a name that is taken.
    """
    runs.check_name(new)
    _check_idle(workspace, run)
    if new != run.name:
        _check_free(workspace, new)
        _move(run.path, run.path.parent / new)
        sweep.follow(workspace, run.name, new)
    named = Run(run.path.parent / new)
    settle(named)
    return named


def settle(run: Run) -> None:
    """Call a run's LoRA files after it; what is called so already stays."""
    for path in sorted(run.exports.glob("*.safetensors")):
        match = EXPORT.fullmatch(path.name)
        if match and not (goal := run.export_of(int(match.group(1)))).exists():
            os.replace(path, goal)
    others = [path for path in run.path.glob("*.safetensors") if path != run.result]
    if len(others) == 1 and not run.result.exists():
        os.replace(others[0], run.result)


def delete(workspace: Path, run: Run) -> str:
    """Move a run to the trash; returns what it is called there, for `restore`.

    Raises `UserError` for a living or waiting run.
    """
    _check_idle(workspace, run)
    folder = _folder(workspace)
    folder.mkdir(parents=True, exist_ok=True)
    stamp, number = time.strftime(STAMP), 1
    entry = f"{stamp}-{run.name}"
    while (folder / entry).exists():
        number += 1
        entry = f"{stamp}.{number}-{run.name}"
    _move(run.path, folder / entry)
    return entry


def restore(workspace: Path, entry: str) -> Run:
    """Bring a run back from the trash, under its old name.  `UserError` when that is taken by now."""
    found = _find(workspace, entry)
    _check_free(workspace, found.name)
    goal = workspace / "runs" / found.name
    goal.parent.mkdir(parents=True, exist_ok=True)
    _move(_folder(workspace) / found.entry, goal)
    return Run(goal)


def trash(workspace: Path) -> list[Trashed]:
    """The runs in the trash, the newest first."""
    found = []
    for path in _folder(workspace).glob("*"):
        if (match := ENTRY.fullmatch(path.name)) and path.is_dir():
            try:
                deleted = time.mktime(time.strptime(match.group(1), STAMP))
            except ValueError:  # somebody else's folder
                continue
            found.append(Trashed(path.name, match.group(2), deleted, _size(path)))
    return sorted(found, key=lambda one: (one.deleted, one.entry), reverse=True)


def erase(workspace: Path, entries: Iterable[str]) -> int:
    """Delete runs in the trash for good; returns the bytes that came free."""
    found = [_find(workspace, entry) for entry in entries]
    for one in found:
        path = _folder(workspace) / one.entry
        try:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be deleted: {error.strerror}") from None
    return sum(one.bytes for one in found)


def _folder(workspace: Path) -> Path:
    return workspace / "trash" / "runs"


def _find(workspace: Path, entry: str) -> Trashed:
    found = next((one for one in trash(workspace) if one.entry == entry), None)
    if found is None:
        raise UserError(f"{entry[:200]} is not in the trash any more")
    return found


def _check_idle(workspace: Path, run: Run) -> None:
    if not run.path.is_dir():
        raise UserError(f"there is no run called {run.name!r} any more")
    if run.is_held():
        raise UserError(f"{run.name} is being trained; stop it first: python -m trainer stop {run.name}")
    if run.name in Queue(workspace).names():
        raise UserError(f"{run.name} is in the queue; take it out first: python -m trainer queue cancel {run.name}")


def _check_free(workspace: Path, name: str) -> None:
    if os.path.lexists(workspace / "runs" / name) or name in Queue(workspace).names():
        raise UserError(f"there is already a run called {name!r}, or one waits in the queue; choose another name, or "
                        "rename that one")


def _move(path: Path, goal: Path) -> None:
    """In one step, or not at all."""
    try:
        os.rename(path, goal)
    except OSError as error:
        raise UserError(f"{path} cannot be moved to {goal}: {error.strerror}; close what has a file of it open, and "
                        "try again") from None


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
