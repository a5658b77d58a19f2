"""Group norms that take and give activations with their channels last, where torch's own copy back and forth."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
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
    """Whether the kernels can be made and are right on this GPU."""
    if importlib.util.find_spec("triton") is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    with torch.inference_mode(False), torch.enable_grad():  # pictures may be the first to ask
        generator = torch.Generator(device).manual_seed(0)
        x, grad = (torch.randn(2, 60, 9, 11, device=device, generator=generator).to(
            dtype, memory_format=torch.channels_last) for _ in range(2))
        layer = nn.GroupNorm(6, 60, device=device, dtype=dtype).requires_grad_(False)
        layer.weight.copy_(torch.rand(60, device=device, generator=generator) + 0.5)
        found, expected = x.clone().requires_grad_(), x.float().requires_grad_()
        try:
            y = Normalised.apply(found, layer)
            y.backward(grad)
        except torch.OutOfMemoryError:  # says nothing of the kernels, and would be remembered
            raise
        except Exception:  # of Triton, of the compiler that it calls: torch's own norm does
            return False
        exact = F.group_norm(expected, 6, layer.weight.float(), layer.bias.float(), layer.eps)
        exact.backward(grad.float())
        near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
        return torch.allclose(y.float(), exact, **near) and torch.allclose(found.grad.float(), expected.grad, **near)
