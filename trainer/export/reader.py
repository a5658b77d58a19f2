"""Reads a LoRA file, ours or somebody else's, as the pairs that an adapter can continue from."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import UserError
from trainer.export import names

Pairs = dict[str, tuple[Tensor, Tensor, Tensor | None]]  # module path -> up, down, magnitude

# What a file is when the family's map does not know its names: part of a tensor's name, in words.
_OTHERS = {
    "hada_w1": "a LoHa file, whose factors are of another kind",
    "lokr_w": "a LoKr file, whose factors are of another kind",
    "lora_mid": "a LoCon file with Tucker factors",
    "oft_": "an OFT file",
    "lora_te1_": "an SDXL LoRA",
    "lora_te2_": "an SDXL LoRA",
    "double_blocks": "a Flux LoRA",
    "single_transformer_blocks": "a Flux LoRA",
    "joint_blocks": "an SD 3 LoRA",
    "first_stage_model": "a base model, not a LoRA",
    "input_blocks": "a base model, or a LoRA with another family's names",
}


def read(path: Path, *, family: str) -> Pairs:
    """Every module that changes something: up [m, r] or [m, r, 1, 1], down [r, n] or [r, c, k, k], magnitude or None.

    In fp32 or better, alpha/rank folded into `up`. Modules of zeros (untrained ones that formats ask for) are left
    out. Raises `UserError` for a file that is not there, cannot be read, is of another family, or lacks a half.
    """
    if not path.is_file():
        raise UserError(f"adapter.start_from: no file {path}; give a LoRA as a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter.start_from: {path} cannot be read as a safetensors file ({error})") from error
    pairs: Pairs = {}
    for key, parts in _modules(path, tensors, family).items():
        if not {"up", "down"} <= parts.keys():
            missing = " and ".join(sorted({"up", "down"} - parts.keys()))
            raise UserError(f"adapter.start_from: {path.name} is not whole: {key} has no {missing}")
        pair = _pair(parts)
        if not all(part.isfinite().all() for part in pair if part is not None):
            raise UserError(f"adapter.start_from: {path.name} holds numbers that are not finite, in {key}")
        if pair[2] is not None or (pair[0].any() and pair[1].any()):
            pairs[names.path_of(key, family) or key] = pair
    if not pairs:
        raise UserError(f"adapter.start_from: {path.name} changes nothing: all its layers are zero")
    return pairs


def _modules(path: Path, tensors: dict[str, Tensor], family: str) -> dict[str, dict[str, Tensor]]:
    """key -> part -> tensor; every tensor must be one that the family's format knows."""
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        found = names.split(name, family)
        if found is None or names.path_of(found[0], family) is None:
            unknown.append(name)
        else:
            modules.setdefault(found[0], {})[found[1]] = tensor
    if unknown or not modules:
        kind = next((words for part, words in _OTHERS.items() for name in tensors if part in name), None)
        said = f"it is {kind}" if kind else f"it has names that a {family} LoRA has not"
        example = f", such as {unknown[0]}" if unknown else ""
        raise UserError(f"adapter.start_from: {path.name} cannot be continued here: {said} "
                        f"({len(unknown)} of {len(tensors)} tensors unknown{example})")
    return modules


def _pair(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    down = parts["down"]
    scale = parts["alpha"].item() / down.shape[0] if "alpha" in parts else 1.0
    dtype = torch.float64 if down.dtype == torch.float64 else torch.float32
    magnitude = parts["dora"].to(dtype) if "dora" in parts else None
    return parts["up"].to(dtype) * scale, down.to(dtype), magnitude
