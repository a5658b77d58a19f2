"""Finds, makes and opens data sets: those of the workspace, and folders below the roots that the app was given."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from app.datasets.arrange import safe_name
from app.datasets.data_set import DataSet
from app.datasets.thumbnails import FactsFile, Workshop
from app.datasets.trash import clear_abandoned
from app.paths import Places, can_be_sent, inside
from trainer.data import folders
from trainer.errors import UserError

Answer = dict[str, Any]
KEPT_OPEN = 4  # data sets in memory
COPY = ".copy-"  # how folders begin into which a data set is being copied
MOST_FOLDERS = 2000  # shown of one folder


class Library:
    """All data sets that this app may touch.  An id is a root's key, ":", and the path below it."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.workshop = Workshop(places.thumbnails)
        self._roots = {_key(root): root for root in (places.datasets, *places.roots)}
        self._open: dict[str, DataSet] = {}
        self._lock = threading.RLock()
        places.hand_out_thumbnails()

    def close(self) -> None:
        """Let the thumbnails' workers end."""
        self.workshop.close()

    def list_sets(self) -> Answer:
        """The workspace's data sets, those in use below other roots, and the roots themselves."""
        own = self.places.datasets
        own.mkdir(parents=True, exist_ok=True)
        sets = [self._row(f"{_key(own)}:{entry.name}", own=True) for entry in sorted(own.iterdir(), key=_by_name)
                if entry.is_dir() and not entry.name.startswith(".") and _is_name(entry.name)
                and _stays_inside(own, entry.name)]
        with self._lock:
            sets += [self._row(id, own=False) for id, found in self._open.items()
                     if not id.startswith(_key(own)) and found.root.is_dir()]
        return {"sets": sets, "roots": [{"id": f"{key}:", "folder": root.as_posix()}
                                        for key, root in self._roots.items() if root != own]}

    def browse(self, id: str) -> Answer:
        """The folders of a folder, each with the number of images directly in it."""
        root, name = self._split(id)
        folder = self._path(id)
        found = [{"id": f"{_key(root)}:{name}/{entry.name}".replace(":/", ":"), "name": entry.name,
                  "images": _images_in(Path(entry.path))}
                 for entry in _folders_in(folder)[:MOST_FOLDERS]]
        up = f"{_key(root)}:{name.rpartition('/')[0]}" if name else None
        return {"id": id, "folder": folder.as_posix(), "up": up, "images": _images_in(folder), "folders": found}

    def create(self, name: str) -> Answer:
        """An empty data set in the workspace."""
        folder = self._new(name)
        folder.mkdir(parents=True)
        return {"id": f"{_key(self.places.datasets)}:{name}"}

    def copy_in(self, id: str, name: str) -> Answer:
        """A copy of a folder with its images, captions, masks and list of excluded ones, in the workspace."""
        source, target = self._path(id), self._new(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(target.parent, COPY)
        draft = Path(tempfile.mkdtemp(prefix=COPY, dir=target.parent))
        try:
            copied = _copy(source, draft)
            os.chmod(draft, 0o755)
            draft.rename(target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return {"id": f"{_key(self.places.datasets)}:{name}", "copied": copied}

    def open(self, id: str) -> DataSet:
        """The data set of that id; one that is open already is the same object."""
        folder = self._path(id)
        with self._lock:
            found = self._open.pop(id, None)
            if found is None:
                facts = self.places.facts / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.jsonl"
                found = DataSet(id, folder, FactsFile(facts), self.workshop)
            self._open[id] = found  # the last one used is the last in order
            while len(self._open) > KEPT_OPEN:
                del self._open[next(iter(self._open))]
            return found

    def id_of(self, folder: Path) -> str:
        """The id under which `open` finds a folder; "" for one that this app may not look into."""
        for key, root in self._roots.items():
            try:
                path, base = folder.resolve(), root.resolve()
                if path == base or base in path.parents:
                    id = f"{key}:{'' if path == base else path.relative_to(base).as_posix()}"
                    self._path(id)
                    return id
            except (OSError, RuntimeError, UserError):  # a loop of links, or a hidden folder
                continue
        return ""

    def _split(self, id: str) -> tuple[Path, str]:
        key, colon, name = id.partition(":")
        if not colon or key not in self._roots:
            raise UserError(f"there is no data set {id[:100]!r} below the folders that this app may read")
        return self._roots[key], name

    def _path(self, id: str) -> Path:
        root, name = self._split(id)
        folder = inside(root, name) if name else root.resolve()
        if not folder.is_dir() or any(part.startswith(".") for part in name.split("/")):
            raise UserError(f"there is no folder {name[:100] or root} any more")
        if not name and root == self.places.datasets:
            raise UserError("choose one of the data sets in the workspace")
        return folder

    def _new(self, name: str) -> Path:
        if not name or safe_name(name) != name:
            raise UserError(f"{name[:100]!r} cannot be a data set's name; use letters, digits, blanks, '_' and '-'")
        folder = inside(self.places.datasets, name)
        if os.path.lexists(folder):
            raise UserError(f"there is already a data set called {name!r}; choose another name")
        return folder

    def _row(self, id: str, own: bool) -> Answer:
        folder = self._path(id)
        return {"id": id, "name": folder.name, "folder": folder.as_posix(), "own": own}


def _key(root: Path) -> str:
    """Stands for a root in ids; the same after a restart, whatever the other roots are."""
    return hashlib.sha256(os.fsencode(root)).hexdigest()[:12]


def _copy(source: Path, target: Path) -> int:
    count = 0
    for path, _ in folders.walk(source, "data set"):
        there = target / path.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        beside = (path.with_suffix(".txt"), folders.mask_of(path), path.with_name(folders.EXCLUDED))
        for file in (path, *beside):
            copy = there.with_name(file.name)
            if file.is_file() and not copy.exists():
                shutil.copyfile(file, copy)
        count += 1
    return count


def _folders_in(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".") and _is_name(entry.name)
                 and entry.is_dir() and _stays_inside(folder, entry.name)]
    return sorted(found, key=lambda entry: entry.name.casefold())


def _stays_inside(folder: Path, name: str) -> bool:
    try:
        inside(folder, name)
    except UserError:
        return False
    return True


def _images_in(folder: Path) -> int:
    try:
        return sum(folders.is_image(name) for name in os.listdir(folder))
    except OSError:  # not ours to read
        return 0


def _is_name(name: str) -> bool:
    return can_be_sent(name) and not set(name) & set(":\\\0")


def _by_name(path: Path) -> str:
    return path.name.casefold()
