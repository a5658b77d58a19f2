"""The layers of a denoiser as they are fast on a GPU, whatever the run and however the model is held."""

from __future__ import annotations

import torch
from torch import nn

from trainer.fast import convolutions, group_norm, whole_gradient


def install(denoiser: nn.Module, device: torch.device) -> None:
    """On a GPU let convolutions lie with their channels last and group norms be of a class that keeps them so; for all
    models of this process, let attention's gradients lie as cuDNN expects them. Again is no harm."""
    if device.type == "cuda":
        convolutions.lay_out(denoiser)
        group_norm.install(denoiser)
        whole_gradient.install()
