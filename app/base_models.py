"""Base models that other programs have on this machine, for the preset's form: listed, and taken by their id only."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

from app import form
from app.paths import Places, can_be_sent
from trainer import preset
from trainer.bases import Found, Index
from trainer.errors import UserError
from trainer.model_folders import Place, places_in, unique, usual_places

PARTS = ("vae", "text_encoder", "text_encoder_2")  # settings that go with a base


class BaseModels:
    """What is found in the usual folders and those of `--models`."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._index = Index()
        self._found: dict[str, Found] = {}
        self._lock = threading.Lock()

    def listing(self) -> dict[str, Any]:
        """All of them, with the folders that were looked through."""
        own = [Place("made here", self._places.models)] if self._places.models.is_dir() else []
        told = [place for folder in self._places.model_folders for place in places_in(folder)]
        usual = usual_places(self._places.around) if self._places.around else []
        places = unique([*own, *told, *usual])
        found = {id_of(one): one for one in self._index.find(places) if can_be_told(one)}
        with self._lock:
            self._found = found
        return {"bases": [{"id": id} | one.as_dict() for id, one in found.items()],
                "places": [str(place.folder) for place in places]}

    def take(self, text: str, id: str) -> tuple[str, str]:
        """The text with this base and its parts, and what was done, in a sentence."""
        with self._lock:
            one = self._found.get(id)
        if one is None or not one.family:
            raise UserError("there is no such base model in the list; open the list again")
        values = form.values_of(text)
        if values is None:
            raise UserError("the text is not valid TOML; mend it first")
        before = values.get("model", {})
        given = {key: path for key, path in one.parts.items() if key in PARTS or not before.get(key)}
        gone = [key for key in PARTS if before.get(key) and key not in one.parts]
        said = f"The base model is {one.name} now."
        said += f" Its {_and(_words(key) for key in given)} came with it." if given else ""
        said += f" {_and(f'model.{key}' for key in gone)} was taken out: it has its own." if gone else ""
        changes = {"family": one.family, "base": one.base} | given | dict.fromkeys(gone)
        return preset.update_text(text, {"model": changes}), said


def id_of(one: Found) -> str:
    return hashlib.sha256(one.base.encode()).hexdigest()[:16]


def can_be_told(one: Found) -> bool:
    """Whether the names of all its files are text."""
    return all(map(can_be_sent, [one.base, *one.parts.values()]))


def _words(key: str) -> str:
    return {"vae": "VAE", "tokenizer_2": "T5 tokenizer"}.get(key, key.replace("_2", " 2").replace("_", " "))


def _and(words: Any) -> str:  # noqa: ANN401
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
