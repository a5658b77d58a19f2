"""Which layers of a model are quantised, how each is made from the weight of a file, and what it weighs."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from trainer.quantize.linear import (
    NF4_BLOCK,
    SCALE_BLOCK,
    Nf4Linear,
    QuantizedLinear,
    RowScaledLinear,
    fp8_linear,
    int8_linear,
)

MODES = ("fp8", "int8", "nf4")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # weights that come as codes already
_BLOCK = re.compile(r"(?:^|\.)(?:(?:single_)?transformer_blocks|block|layers)\.\d+\.")


def linears_in_blocks(model: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """The linears of a model's repeated transformer blocks, by their paths: what is quantised.

    prefix: what paths begin with when `model` is a part of the whole.
    Embeddings, norms, first and last projections and convolutions stay as they are: they are small, or sensitive.
    """
    return {path: module for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and _BLOCK.search(prefix + path)}


def block_paths(model: nn.Module) -> list[str]:
    """Paths of a model's repeated transformer blocks, as its modules are listed."""
    found = (_BLOCK.search(f"{path}.") for path, _ in model.named_modules())
    return list(dict.fromkeys(match.string[: match.end() - 1] for match in found if match))


def quantised_linear(weight: Tensor, scale: Tensor | None, bias: Tensor | None, mode: str,
                     dtype: torch.dtype) -> QuantizedLinear:
    """A frozen linear that holds `weight` [m, n] in a mode of `MODES` and multiplies in `dtype`.

    scale: of a weight that comes in 8-bit floats ([m], [m, 1] or one number), as ComfyUI's fp8-scaled files keep it;
    in the mode fp8 those codes are held as they are. The weight is quantised where it is, on its own device.
    """
    if mode == "fp8" and weight.dtype in FLOAT8:
        return RowScaledLinear(weight, torch.ones(1) if scale is None else scale, bias, dtype)
    if weight.dtype in FLOAT8:
        weight = weight.float()
    if scale is not None:
        weight = weight.float() * scale.to(weight.device, torch.float32).reshape(-1, 1)
    return {"fp8": fp8_linear, "int8": int8_linear, "nf4": Nf4Linear}[mode](weight, bias, dtype)


def weight_bytes(shape: tuple[int, int], mode: str) -> int:
    """Bytes that a linear's weight [m, n] takes with its scales; mode "none" is 16 bits."""
    count = math.prod(shape)
    if mode == "none":
        return 2 * count
    if mode in ("fp8", "int8"):
        return count + 4 * shape[0]
    blocks = -(-count // NF4_BLOCK)
    return blocks * NF4_BLOCK // 2 + blocks + 4 * -(-blocks // SCALE_BLOCK) + 4
