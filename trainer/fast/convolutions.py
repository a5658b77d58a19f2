"""In which order a GPU's convolutions, and what lies between them, hold their numbers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

# What tensor cores read; group_norm.py spares the copies that torch's group norms make for it.
LAYOUT = torch.channels_last


class OrderedTransformer(Transformer2DModel):
    """A UNet's stack of attention blocks that leaves images in the order in which they came; diffusers' own always
    gives them with their channels first, and all that follows would be copied."""

    def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:  # noqa: ANN401 - as its base
        found = super().forward(hidden_states, *rest, **named)
        if isinstance(found, tuple) and hidden_states.is_contiguous(memory_format=LAYOUT):
            return found[0].contiguous(memory_format=LAYOUT), *found[1:]
        return found


def lay_out(model: nn.Module, layout: torch.memory_format = LAYOUT) -> None:
    """Let weights of convolutions lie so; what they make follows their weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
        elif type(module) is Transformer2DModel:
            module.__class__ = OrderedTransformer
