"""The noise of a sample, for any objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(shape: Sequence[int], generator: torch.Generator, device: torch.device | str, offset: float) -> Tensor:
    """Normal noise c h w in fp32; `offset` scales a shift of whole channels, drawn last so that it changes nothing
    else."""
    noise = torch.randn(*shape, generator=generator, device=device)  # c h w
    if not offset:
        return noise
    shift = torch.randn(shape[0], generator=generator, device=device)
    return noise + offset * shift.view(-1, *[1] * (len(shape) - 1))  # c 1 1
