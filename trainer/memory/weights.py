"""What a model's weights take, known from its skeleton on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from trainer.quantize.model import linears_in_blocks, weight_bytes


def bytes_of(skeleton: nn.Module, quantize: str, dtype: torch.dtype) -> int:
    """Bytes of all weights: in `dtype`, but for those of the linears that `quantize` holds in fewer bits."""
    everything = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
    if quantize == "none":
        return everything
    linears = [linear.weight for linear in linears_in_blocks(skeleton).values()]
    return (everything - sum(weight.numel() for weight in linears) * dtype.itemsize
            + sum(weight_bytes((weight.shape[0], weight.shape[1]), quantize) for weight in linears))
