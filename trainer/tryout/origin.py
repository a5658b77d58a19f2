"""On which base model a LoRA was trained, as far as its run or its metadata tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer import preset as presets
from trainer.errors import UserError
from trainer.export import header, metadata
from trainer.export.recognise import family_of
from trainer.schema import FAMILY_MODEL, Preset


def preset_of(file: Path) -> Preset | None:
    """The preset of the run in whose folder the file lies; None for any other file."""
    for folder in (file.resolve().parent, file.resolve().parent.parent):
        if (folder / "preset.toml").is_file():
            return presets.load(folder / "preset.toml")
    return None


def model_settings(preset: Preset) -> dict[str, Any]:
    """The base of a preset as a try-out's settings take it."""
    chosen = {key: getattr(preset.model, key) for key in ("family", "base", *FAMILY_MODEL[preset.model.family])}
    quantize = preset.memory.quantize
    return chosen | ({} if quantize == "auto" else {"quantize": quantize})


def said_base(said: dict[str, str]) -> str:
    """The name of the base in a file's metadata; "" when they do not tell."""
    try:
        model = presets.read_toml(said.get(metadata.PRESET_KEY, ""), "metadata").get("model")
    except UserError:
        model = None
    told = model.get("base") if isinstance(model, dict) else ""
    return told if isinstance(told, str) and told else said.get("ss_sd_model_name", "")


def find(file: Path, base: str) -> dict[str, Any]:
    """Settings for a file's base model: `base` where it is given, else the run's or what the file says itself.

    Raises `UserError` for what is no LoRA, and when nothing tells the base.
    """
    about = header.read(file)
    family = family_of(about)
    if base:
        return {"family": family, "base": base}
    if (preset := preset_of(file)) is not None and preset.model.family == family:
        return model_settings(preset)
    told = said_base(about.metadata)
    if told and Path(told).exists():
        return {"family": family, "base": told}
    named = f" (it says {told!r})" if told else ""
    raise UserError(f"{file} does not tell where its base model is{named}: give that as --base")
