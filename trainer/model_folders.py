"""Where other programs keep base models: their folders beside this project and at home, and what they were told."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import constants

PROGRAMS = {  # a program's folder, from where programs are kept: the program
    "ComfyUI": "ComfyUI", "comfyui": "ComfyUI", "ComfyUI_windows_portable/ComfyUI": "ComfyUI",
    "Documents/ComfyUI": "ComfyUI", "comfy/ComfyUI": "ComfyUI",
    "stable-diffusion-webui": "A1111", "stable-diffusion-webui-forge": "Forge", "webui_forge/webui": "Forge",
    "sd-webui-forge-neo": "Forge", "sd-webui-forge-classic": "Forge", "stable-diffusion-webui-reForge": "reForge",
    "OneTrainer": "OneTrainer", "SwarmUI": "SwarmUI", "StabilityMatrix/Data": "Stability Matrix",
    "sdnext": "SD.Next", "kohya_ss": "kohya_ss",
}
# Subfolders of models/ that hold what a base is made of, small letters; LoRAs and the like are not looked at.
KEPT = ("checkpoints", "diffusion_models", "unet", "vae", "text_encoders", "text_encoder", "clip", "diffusers",
        "stable-diffusion", "stablediffusion", "textencoders", "diffusionmodels")
EXTRA_PATHS = "extra_model_paths.yaml"  # in which ComfyUI is told of more folders
HUB = Path(constants.HF_HUB_CACHE)
DEEPEST = 4  # folders below a place
MOST = 20_000  # entries of a place that are looked at


class Place(NamedTuple):
    """A folder to look through, and whose it is."""

    program: str
    folder: Path


def usual_places(parents: Iterable[Path]) -> list[Place]:
    """The folders of other programs, and the cache of downloads, in these folders (this project's parent, home)."""
    found: list[Place] = []
    for parent in dict.fromkeys(parents):
        for name, program in PROGRAMS.items():
            if (parent / name).is_dir():
                found += places_in(parent / name, program)
    return unique([*found, *([Place("Hugging Face cache", HUB)] if HUB.is_dir() else [])])


def places_in(folder: Path, program: str = "") -> list[Place]:
    """What of a folder is to be looked through: a program's model folders, else the folder itself."""
    program = program or folder.name
    models = next((folder / name for name in ("models", "Models") if (folder / name).is_dir()), folder)
    kept = [Place(program, path) for path in _folders(models) if path.name.lower() in KEPT]
    return (kept or [Place(program, folder)]) + _told(folder / EXTRA_PATHS, program)


def unique(places: Iterable[Place]) -> list[Place]:
    """The same places without those that links make twice."""
    return list({place.folder.resolve(): place for place in places}.values())


def walk(place: Place) -> Iterator[tuple[Path, bool]]:
    """Model files, and folders in diffusers' layout (True), in a place; links are followed, each folder once."""
    seen: set[Path] = set()
    waiting, left = [(place.folder, 0)], MOST
    while waiting and left > 0:
        folder, depth = waiting.pop()
        real = folder.resolve()
        if real in seen:
            continue
        seen.add(real)
        if (folder / "model_index.json").is_file():
            yield folder, True
            continue
        if newest := _newest(folder):
            waiting.append((newest, depth + 2))
            continue
        with suppress(OSError):  # a folder of somebody else's
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                left -= 1
                path = Path(entry.path)
                if entry.is_dir() and depth < DEEPEST and not entry.name.startswith("."):
                    waiting.append((path, depth + 1))
                elif entry.name.endswith(".safetensors") and entry.is_file():
                    yield path, False


def _newest(folder: Path) -> Path | None:
    """In a cache of downloads, a model's newest version: older ones lie beside it."""
    with suppress(OSError):
        if folder.name.startswith("models--"):
            return folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    return None


def hub_id(folder: Path) -> str:
    """The hub id of a folder in the cache that downloads go to (`models--org--name/snapshots/…`), else ""."""
    if not folder.is_relative_to(HUB):
        return ""
    return folder.relative_to(HUB).parts[0].removeprefix("models--").replace("--", "/", 1)


def _folders(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    return []


def _told(file: Path, program: str) -> list[Place]:
    """The folders that ComfyUI's own list names; a list that cannot be read names none."""
    try:
        groups = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    found = []
    for group in groups.values() if isinstance(groups, dict) else []:
        if isinstance(group, dict):
            base = file.parent / Path(str(group.get("base_path", ""))).expanduser()
            names = [name.strip() for key, value in group.items() if str(key).lower() in KEPT for name in _lines(value)]
            found += [Place(program, base / name) for name in names if name and (base / name).is_dir()]
    return found


def _lines(value: Any) -> list[str]:  # noqa: ANN401
    return value.splitlines() if isinstance(value, str) else []
