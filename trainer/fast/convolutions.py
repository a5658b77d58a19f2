"""In which order a GPU's convolutions hold their numbers."""

from __future__ import annotations

import torch
from torch import nn

# What tensor cores read; group_norm.py spares the copies that torch's group norms make for it.
LAYOUT = torch.channels_last


def lay_out(model: nn.Module, layout: torch.memory_format = LAYOUT) -> None:
    """Let weights of convolutions lie so; what they make follows their weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
