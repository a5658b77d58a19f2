"""Walks LoRA files layer by layer, the parts of q, k and v that models may keep as one matrix together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.export import formats, names
from trainer.export.lora_file import LoraFile, open_lora
from trainer.export.stacked import Pair

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def open_whole(path: Path) -> LoraFile:
    """A LoRA of which every tensor is known. Raises UserError for another: a tool would lose the rest of it."""
    lora = open_lora(path)
    if lora.unknown or lora.incomplete:
        name = [*lora.unknown, *lora.incomplete][0]
        raise UserError(f"{path} cannot be read whole: nothing is known of {name}. `python -m trainer.export verify` "
                        "tells what is wrong with it")
    return lora


def rows(lora: LoraFile) -> dict[str, list[str]]:
    """The file's keys by the layer that they change; q, k and v of Flux, and mlp with them, are one layer."""
    naming = names.naming(lora.family, "kohya")
    found: dict[str, list[str]] = {}
    for key, entry in lora.entries.items():
        module = entry.place.modules[0]
        place = naming.of(module)
        found.setdefault(place.key if place else module, []).append(key)
    return found


def pairs_of(lora: LoraFile, keys: list[str]) -> list[Pair]:
    """The modules of some keys, alpha folded in. Raises UserError for numbers that are not finite."""
    pairs = list(lora.pairs(keys=keys))
    for module, *factors in pairs:
        if not all(part.isfinite().all() for part in factors if part is not None):
            raise UserError(f"{lora.path} holds numbers that are not finite, in {module}: the training has diverged")
    return pairs


def stacks(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs of one layer, those together that share their `down`: they are rows of one matrix."""
    found: list[list[Pair]] = []
    for pair in pairs:
        same = (stack for stack in found if torch.equal(stack[0][2], pair[2]))
        if (stack := next(same, None)) is None:
            found.append([pair])
        else:
            stack.append(pair)
    return found


def own_format(lora: LoraFile) -> str:
    """The format to write a file's change in: its own, else one with the same names, else the family's usual."""
    written = formats.WRITTEN[lora.family]
    if lora.format.name in written:
        return lora.format.name
    alike = (name for name in written if formats.find(lora.family, name).style == lora.format.style)
    return next(alike, written[0])


def source(lora: LoraFile, weight: float | None = None) -> dict[str, Any]:
    """A file as an entry of the history."""
    found = {"name": lora.path.name, "hash": lora.metadata.get("sshs_model_hash"), "weight": weight}
    return {key: value for key, value in found.items() if value is not None}


def check_out(out: Path, *inputs: Path) -> None:
    """Refuse a place where the result cannot go, before hours of work: over what is read, a folder, another kind."""
    if out.is_dir():
        raise UserError(f"{out} is there already, as a folder: give another --out")
    if out.suffix in PICKLES:
        raise UserError(f"{out}: programs take a {out.suffix} file for a pickle. Give --out a name with .safetensors")
    if any(out.resolve() == path.resolve() for path in inputs):
        raise UserError(f"{out} is one of the files to read: give another --out")
