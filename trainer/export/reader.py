"""Reads a LoRA file, ours or somebody else's, as the pairs that an adapter can continue from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from trainer.errors import UserError, naming
from trainer.export.lora_file import LoraFile, open_lora
from trainer.export.recognise import kind_in_words

Pairs = dict[str, tuple[Tensor, Tensor, Tensor | None]]  # module path -> up, down, magnitude


def read(path: Path, *, family: str) -> Pairs:
    """Every module that changes something: up [m, r] or [m, r, 1, 1], down [r, n] or [r, c, k, k], magnitude or None.

    In fp32 or better, alpha/rank folded into `up`; of any format that the family has, q, k and v apart. Modules of
    zeros (untrained ones that formats ask for) are left out. Raises `UserError` for a file that is not there, cannot
    be read, is of another family, or lacks a half.
    """
    with naming("adapter.start_from"):
        if not path.is_file():
            raise UserError(f"no file {path}; give a LoRA as a .safetensors file")
        return pairs(open_lora(path, family=family))


def pairs(lora: LoraFile) -> Pairs:
    """What `read` returns of a file that is open. Raises `UserError` as it does, the setting's name left out."""
    name = lora.path.name
    if lora.unknown:
        raise UserError(f"{name} {kind_in_words(lora.unknown, lora.family)}")
    for key in lora.incomplete:
        raise UserError(f"{name} is not whole: {key} lacks up or down")
    found: Pairs = {}
    for module, up, down, magnitude in lora.pairs():
        if not all(part.isfinite().all() for part in (up, down, magnitude) if part is not None):
            raise UserError(f"{name} holds numbers that are not finite, in {module}")
        if magnitude is not None and magnitude.shape[0] != 1:
            raise UserError(f"{name}: the DoRA magnitudes of {module} are of the output axis, which is not read here")
        if magnitude is not None or (up.any() and down.any()):
            found[module] = up, down, magnitude
    if not found:
        raise UserError(f"{name} changes nothing: all its layers are zero")
    return found
