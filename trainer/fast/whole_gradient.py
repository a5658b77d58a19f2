"""Lets cuDNN's attention have gradients that lie as it expects them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn


class WholeGradient(torch.autograd.Function):
    """The same tensor, whose gradient is made contiguous where it is a part of a larger one.

    torch keeps cuDNN's plan of a backward pass for the layouts of queries, keys and values, and takes it again for a
    gradient that lies otherwise: it then reads outside of it. Flux.1 needs this: its two kinds of blocks have all three
    alike, and one kind's gradient is a part of a wider one. (torch's newest source has the gradient's layout in the
    cache's key: aten/src/ATen/native/cudnn/MHA.cpp.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def keep_gradients_whole(denoiser: nn.Module) -> None:
    """See to it in a model's blocks that need it."""
    for block in denoiser.modules():
        if isinstance(block, FluxSingleTransformerBlock):
            block.attn.register_forward_hook(lambda attn, given, found: WholeGradient.apply(found))
