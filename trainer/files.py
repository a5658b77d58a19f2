"""Writes files so that a kill or a power cut leaves the old one or the new one, never half."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

MAY_SYNC_AT_ONCE = hasattr(os, "sync")  # not on Windows
MANY = 100  # files
_TEMPORARY = re.compile(r"\..*\.[a-z0-9_]{8}", re.DOTALL)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader, or a kill, sees the old bytes or the new, never half."""
    _rename(_write_beside(path, content), path)


def write_soon(path: Path, content: bytes) -> None:
    """The same without waiting for the disk: a kill leaves nothing half, but a power cut may, so it is for what is
    checked when it is read and can be made again."""
    _rename(_write_beside(path, content, sync=False), path)


def _rename(temporary: str, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece that takes the place of `path` when the block ends well, and vanishes otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=_prefix(path.name), dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Replace each of many files in one step, once all new contents are on the disk.

    A full disk is thus told before any file has changed; a kill leaves some old and some new.
    """
    at_once = MAY_SYNC_AT_ONCE and len(contents) > MANY
    ready: dict[str, Path] = {}
    try:
        for path, content in contents.items():
            ready[_write_beside(path, content, sync=not at_once)] = path
        if at_once:
            os.sync()  # it waits for other programs' files, too, but thousands of single calls take many seconds
        for temporary, path in list(ready.items()):
            os.replace(temporary, path)
            del ready[temporary]
    finally:
        for temporary in ready:
            Path(temporary).unlink(missing_ok=True)


def clear_remains(folder: Path, names: Iterable[str]) -> None:
    """Take away what a kill can leave of writing these files: new contents that never got their names."""
    prefixes = {_prefix(name) for name in names}
    for entry in list(folder.iterdir()):
        if _TEMPORARY.fullmatch(entry.name) and entry.name[:-8] in prefixes:
            entry.unlink(missing_ok=True)


def _prefix(name: str) -> str:
    return f".{name[:60]}."  # a name of the greatest length leaves no room for more


def _write_beside(path: Path, content: bytes, sync: bool = True) -> str:
    """A hidden file in the same folder with that content and the rights of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=_prefix(path.name), dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary


def sync_folder(folder: Path) -> None:
    """Make a rename outlive a power cut; Windows has no such call and needs none."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
