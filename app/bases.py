"""Base models that the tab "Export" may read: those of runs, the demo's, and those found in the app's folders."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.base_models import can_be_told, id_of
from app.paths import Places
from trainer import preset as presets
from trainer.bases import Found, Index
from trainer.errors import UserError
from trainer.model_folders import Place, places_in, unique, usual_places
from trainer.tryout import origin

Answer = dict[str, Any]
DEMO = presets.SHIPPED / "demo" / "base"
HOLDS = 10.0  # seconds for which a listing holds
MOST = 300  # base models that are listed


class Bases:
    """Ids are "run:" and a run's name, "demo:base", or "found:" and what stands for a path in the listing."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._index = Index()
        self._found: dict[str, Found] = {}
        self._listed: tuple[float, list[Answer]] = (-HOLDS, [])
        self._lock = threading.Lock()

    def listing(self) -> Answer:
        """All base models with their family and bytes, the newest run's first; and the room on the workspace's disk."""
        with self._lock:
            if time.monotonic() - self._listed[0] > HOLDS:
                self._listed = time.monotonic(), [*self._of_runs(), *self._in_folders()][:MOST]
        self.places.workspace.mkdir(parents=True, exist_ok=True)
        return {"bases": self._listed[1], "free": shutil.disk_usage(self.places.workspace).free}

    def settings(self, id: str) -> dict[str, Any]:
        """Family, base and its other parts, as a preset's [model] has them. Raises `UserError` for no base model."""
        place, _, name = id.partition(":")
        if place == "run":
            return origin.model_settings(presets.load(self.places.run(name).preset))
        if id == "demo:base":
            return {"family": "sd15", "base": str(DEMO)}
        found = self._found.get(name) if place == "found" else None
        if found is None:
            raise UserError(f"there is no base model {id[:100]!r} in the list; open the list again")
        return {"family": found.family, "base": found.base} | found.parts

    def path(self, id: str) -> Path:
        """The file or folder of a base. Raises `UserError` for one that is not on this machine."""
        base = self.settings(id)["base"]
        if not Path(base).exists():
            raise UserError(f"{base} is not a file or folder of this machine: choose another base model")
        return Path(base)

    def _of_runs(self) -> Iterator[Answer]:
        """Each base once, with the newest run that had it, and the demo's."""
        known: list[Answer] = []
        for run in self.places.list_runs():
            try:
                chosen = origin.model_settings(presets.load(run.preset))
            except UserError:  # of another version of the program, or being written
                continue
            if chosen not in known:
                known.append(chosen)
                base = Path(chosen["base"])
                yield _row(f"run:{run.name}", f"{base.name} (of {run.name})", chosen["family"], base)
        if DEMO.is_dir() and not any(chosen["base"] == str(DEMO) for chosen in known):
            yield _row("demo:base", "The demo's base", "sd15", DEMO)

    def _in_folders(self) -> Iterator[Answer]:
        """Those in the folders that the app may read, and in other programs' usual ones, with all their parts."""
        folders = [Place("made here", self.places.models)] if self.places.models.is_dir() else []
        folders += [Place(root.name, root) for root in self.places.roots if root.is_dir()]
        folders += [place for folder in self.places.model_folders for place in places_in(folder)]
        folders += usual_places(self.places.around) if self.places.around else []
        found = [one for one in self._index.find(unique(folders)) if one.family and can_be_told(one)]
        self._found = {id_of(one): one for one in found}
        for key, one in self._found.items():
            yield _row(f"found:{key}", f"{one.name} ({one.program})", one.family, Path(one.base), one.bytes,
                       ready=one.is_ready)


def _row(id: str, label: str, family: str, path: Path, size: int = 0, *, ready: bool = True) -> Answer:
    """ready: whether all parts are there that drawing needs; the tools for LoRAs need none of them.

    place: what two rows of the same file or folder have in common.
    """
    return {"id": id, "label": label, "family": family, "bytes": size or _bytes(path), "here": path.exists(),
            "ready": ready, "place": os.path.realpath(path)}


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
