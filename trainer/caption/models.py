"""Finds a captioner by folder or hub id, and loads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub.hf_api import RepoSibling
from PIL import Image

from trainer.caption import tagger
from trainer.caption.task import Settings
from trainer.errors import UserError
from trainer.families import hub

_BESIDE = (".json", ".txt", ".jinja", ".model")  # what a model needs beside its weights


class Captioner(Protocol):
    tags: bool  # whether it says tags parted by commas

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """A text for each RGB image."""


def load(settings: Settings, folder: Path, device: torch.device, dtype: torch.dtype) -> Captioner:
    """The model of a folder.  Raises `UserError`."""
    if tagger.is_tagger(folder):
        return tagger.Tagger(folder, threshold=settings.threshold, character_threshold=settings.character_threshold,
                             blacklist=settings.blacklist, underscores=settings.underscores)
    from trainer.caption.vlm import Describer  # late: a tagger needs no transformers

    return Describer(folder, instruction=settings.instruction, max_tokens=settings.max_tokens, device=device,
                     dtype=dtype)


def find(model: str, on_download: Callable[[hub.Progress], None]) -> Path:
    """The folder of a captioner: as given, from the hub's cache, or downloaded.

    `on_download` is told some times a second how far a download is, and may leave it by raising.  Raises `UserError`.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not hub.is_hub_id(model):
        state = "is a file; give the folder that it is in" if folder.exists() else "is not there"
        raise UserError(f"captioning.model: {model} {state}. Give a folder, or a hub id such as "
                        "florence-community/Florence-2-base")
    there = hub.cached(model)
    if there and _is_whole(there):
        return there
    plan = hub.plan_files(model, lambda files: _wanted(model, files))
    hub.check_room(plan)
    for progress in hub.fetch(plan):
        on_download(progress)
    return _cached(model)


def _cached(model: str) -> Path:
    """The folder of a model that was just downloaded."""
    there = hub.cached(model)
    if there is None:
        raise UserError(f"{model} was removed from the hub's cache while it was downloaded; start again")
    return there


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the hub's cache has all that it takes: a download may have been cut off."""
    if tagger.is_tagger(folder):
        return (folder / tagger.TAGS).is_file()
    index = folder / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    except (ValueError, KeyError, AttributeError):
        return False
    prepared = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    return prepared and all((folder / name).is_file() for name in ("config.json", *shards))


def _wanted(repo: str, files: Sequence[RepoSibling]) -> list[RepoSibling]:
    top = [file for file in files if "/" not in file.rfilename]
    names = {file.rfilename for file in top}
    if {tagger.MODEL, tagger.TAGS} <= names:
        return [file for file in top if file.rfilename in (tagger.MODEL, tagger.TAGS)]
    weights = [file for file in top if file.rfilename.startswith("model") and file.rfilename.endswith(".safetensors")]
    if not weights or "config.json" not in names:
        raise UserError(f"{repo} on the hub has no .safetensors weights with a config.json, and no {tagger.MODEL} with "
                        f"{tagger.TAGS}: choose another captioner")
    return weights + [file for file in top if file.rfilename.endswith(_BESIDE)]
