"""Another dtype for many stacks at once, and their gradients back: one kernel instead of one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cast(stacks: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`stacks`, all of one dtype, in another; differentiable. Those that have it already are returned as they are."""
    if all(stack.dtype == dtype for stack in stacks.values()):
        return dict(stacks)
    return dict(zip(stacks, Cast.apply(dtype, *stacks.values())))


class Cast(torch.autograd.Function):
    """The copies, and gradients in the dtype of what was copied."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *stacks: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = stacks[0].dtype
        return tuple(_copies(stacks, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copies(grads, ctx.dtype)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies
