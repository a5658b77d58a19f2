"""Lets cuDNN's attention have gradients that lie as it expects them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_plain = F.scaled_dot_product_attention


class WholeGradient(torch.autograd.Function):
    """What attention found [b, h, n, d], with a gradient that lies as a whole tensor [b, n, h, d].

    torch keeps cuDNN's plan of a backward pass by the layouts of queries, keys and values, and takes it again for a
    gradient that lies otherwise: it then reads outside of it, and the process dies of an illegal memory access. That
    happens where a gradient is a part of a wider one in some blocks and not in others (Flux.1), or in plain passes and
    not in compiled ones (Flux.2). (torch's newest source has the gradient's layout in the cache's key:
    aten/src/ATen/native/cudnn/MHA.cpp.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.transpose(-3, -2).contiguous().transpose(-3, -2)


def attention(*given: Tensor, **named: Any) -> Tensor:  # noqa: ANN401 - as torch's own
    """`scaled_dot_product_attention` with a whole gradient."""
    found = _plain(*given, **named)
    return WholeGradient.apply(found) if found.requires_grad and found.ndim == 4 else found


def install() -> None:
    """From now on for every model of this process: each calls attention by its name in torch."""
    F.scaled_dot_product_attention = attention
