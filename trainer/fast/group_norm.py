"""Group norms that take and give activations with their channels last, where torch's own copy back and forth."""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ChannelsLastNorm(nn.GroupNorm):
    """A frozen group norm. Compiled blocks have torch's own, which the compiler joins with what surrounds it."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not suits(x):
            return super().forward(x)
        return Normalised.apply(x, self)


class Normalised(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias by groups of channels: [n, c, h, w] -> [n, c, h, w].

    The layer is held as a module, since its weights may be elsewhere between the passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.GroupNorm) -> Tensor:
        from trainer.fast import group_norm_kernel  # late: Triton is only where there is a GPU for it

        y, mean, scale = group_norm_kernel.normalise(x, layer.weight, layer.bias, layer.num_groups, layer.eps)
        ctx.save_for_backward(x, mean, scale)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from trainer.fast import group_norm_kernel  # late, as above

        x, mean, scale = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        return group_norm_kernel.input_gradient(grad, x, ctx.layer.weight, mean, scale), None


def install(model: nn.Module) -> None:
    """Let a frozen model's group norms run so, wherever their inputs have their channels last."""
    for module in model.modules():
        if type(module) is nn.GroupNorm and module.weight is not None and module.bias is not None:
            module.__class__ = ChannelsLastNorm


def suits(x: Tensor) -> bool:
    """Whether the kernels take an activation."""
    return x.is_cuda and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and works(x.device, x.dtype)


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be made and are right on this GPU.

    Asked in the middle of a pass, maybe of a block that is checkpointed: nothing here is recorded for gradients, since
    the block would count it as its own.
    """
    if importlib.util.find_spec("triton") is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    with torch.no_grad():
        generator, (n, channels, *sides), groups, eps = torch.Generator(device).manual_seed(0), (2, 60, 9, 11), 6, 1e-5
        x, grad = (torch.randn(n, channels, *sides, device=device, generator=generator).to(
            dtype, memory_format=torch.channels_last) for _ in range(2))
        weight, bias = torch.rand(2, channels, device=device, generator=generator).to(dtype) + 0.5
        try:
            from trainer.fast import group_norm_kernel  # late, as above

            y, mean, scale = group_norm_kernel.normalise(x, weight, bias, groups, eps)
            slope = group_norm_kernel.input_gradient(grad, x, weight, mean, scale)
        except torch.OutOfMemoryError:  # says nothing of the kernels, and would be remembered
            raise
        except Exception:  # of Triton, of the compiler that it calls: torch's own norm does
            return False
        x, grad, weight, bias = (part.float().contiguous() for part in (x, grad, weight, bias))
        shape = n, channels, math.prod(sides), groups
        exact, mean, scale = torch.native_group_norm(x, weight, bias, *shape, eps)
        expected, _, _ = torch.ops.aten.native_group_norm_backward(grad, x, mean, scale, weight, *shape,
                                                                   [True, False, False])
        near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
        return torch.allclose(y.float(), exact, **near) and torch.allclose(slope.float(), expected, **near)
