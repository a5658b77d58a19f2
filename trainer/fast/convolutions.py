"""In which order a GPU's convolutions hold their numbers."""

from __future__ import annotations

import torch
from torch import nn

# Channels last is what tensor cores read, but group norms of torch copy back and forth for it. As torch has it by
# itself, until a whole step is measured to be faster otherwise: tests/bench/step_time.py, rows with +nhwc.
LAYOUT = torch.contiguous_format


def lay_out(model: nn.Module, layout: torch.memory_format = LAYOUT) -> None:
    """Let weights of convolutions lie so; what they make follows their weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
