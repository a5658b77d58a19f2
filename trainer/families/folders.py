"""Diffusers folders: the config and the weight files of each component."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.families.header import Part, read_header


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming the file when it is missing or broken."""
    if not file.is_file():
        raise UserError(f"there is no file {file}: the model folder is not complete")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file} is not valid JSON: copy or download the model again") from None


def component(folder: Path) -> Part:
    """A component's config and tensors, as from_pretrained would find them. Raises UserError naming what is missing."""
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise UserError(f"{folder} holds weights that were already quantised ({_method(config)}): use the model's own "
                        "in bf16 or fp16; memory.quantize then makes them small")
    tensors = {}
    for file in weight_files(folder):
        tensors |= read_header(file).tensors
    return Part(folder, config, tensors, "diffusers")


def _method(config: dict[str, Any]) -> str:
    return str(config["quantization_config"].get("quant_method", "somehow"))


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors of one component: the shards of its index, the plain file, or its fp16 variant."""
    index = next(iter(sorted(folder.glob("*.safetensors.index*.json"))), None)
    if index:
        return sorted({folder / name for name in read_json(index)["weight_map"].values()})
    files = sorted(folder.glob("*.safetensors"))
    if not files and any(file.suffix in {".bin", ".ckpt", ".pt"} for file in folder.iterdir()):
        raise UserError(
            f"{folder} has only pickled weights (.bin), which can run any program when they are opened: "
            f"use a copy of this model with .safetensors"
        )
    if not files:
        raise UserError(f"there are no .safetensors weights in {folder}: the model folder is not complete")
    plain = [file for file in files if file.name.count(".") == 1]
    half = [file for file in files if ".fp16." in file.name]
    return (plain or half or files)[:1]


def is_complete(folder: Path, components: Collection[str]) -> bool:
    """Whether the config and all weight files of these components are there (a download may have been cut off)."""
    try:
        return all(
            (folder / name / "config.json").is_file() and all(file.is_file() for file in weight_files(folder / name))
            for name in components
        )
    except (UserError, OSError):
        return False


def explain_no_model(folder: Path) -> UserError:
    """What to say of a folder that has no model_index.json."""
    if (folder / "config.json").is_file():
        return UserError(
            f"{folder} is one component of a model, not a model: give the folder above it, the one with "
            f"model_index.json"
        )
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return UserError(
            f"{folder} is not a diffusers folder: it has no model_index.json. It holds {files[0].name}: "
            f"to train on that, give the file's own path"
        )
    return UserError(f"{folder} is not a model: it has no model_index.json and no .safetensors file")
