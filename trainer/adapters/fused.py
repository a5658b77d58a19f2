"""One autograd function for a frozen layer with its low-rank pair: y = W x + bias + up (down x)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.quantize.linear import QuantizedLinear

AS_IT_IS = nullcontext()


class FusedLayer(torch.autograd.Function):
    """y = base(g*x) + up (down z): saves the input once, in the dtype of the pair, and needs no gradient of W.

    z is g*x, or g times the dropped-out input when dropout is on (it sits on the input of `down`, as in StelLA).
    Gain g (DoRA) scales input columns or channels. Shapes: x [..., n] or [b, c, h, w]; gain [n] or [c];
    down [n or c*k*k, r]; up [m, r]. The layer is held as a module, so bf16, fp8, int8 and NF4 weights work alike.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, gain: Tensor | None, down: Tensor, up: Tensor,
                layer: nn.Module) -> Tensor:
        kind = x.device.type
        y = layer.base_forward(scale_columns(x, gain, layer))
        with autocast(kind, False):
            source = (x if dropped is None else dropped).to(down.dtype)
            hidden = low_rank_hidden(scale_columns(source, gain, layer), down, layer)
            add_low_rank(y, hidden, up, layer)
        needs_x = dropped is not None and (gain is not None or not readable(layer))
        ctx.save_for_backward(source, x if needs_x else None, gain, down, up, hidden)
        ctx.layer, ctx.dropout, ctx.x_dtype = layer, dropped is not None, x.dtype
        ctx.autocast = autocasts(kind)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, x, gain, down, up, hidden = ctx.saved_tensors
        layer, x, grad_base, grad_gain, grad_dropped = ctx.layer, source if x is None else x, None, None, None
        if ctx.needs_input_grad[0] or gain is not None:
            with autocast(grad.device.type, ctx.autocast):
                grad_base = input_gradient(layer, grad, scale_columns(x, gain, layer))
        with autocast(grad.device.type, False):
            grad_hidden, grad_up = up_gradients(grad.to(up.dtype), hidden, up, layer)
            grad_down = down_gradient(scale_columns(source, gain, layer), grad_hidden, down, layer)
            if ctx.dropout:
                grad_z = hidden_gradient(source, grad_hidden, down, layer)
                grad_dropped = scale_columns(grad_z, gain, layer).to(ctx.x_dtype)
            elif grad_base is not None:
                add_hidden_gradient(grad_base, source, grad_hidden, down, layer)
            if gain is not None:
                grad_gain = sum_columns(grad_base.to(gain.dtype) * x, layer)
                grad_gain = grad_gain + sum_columns(grad_z.to(gain.dtype) * source, layer) if ctx.dropout else grad_gain
            grad_x = scale_columns(grad_base, gain, layer).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_dropped, grad_gain, grad_down, grad_up, None


class PairedProduct(torch.autograd.Function):
    """y = W g*x + bias + up (down g*x) by a layer that adds the pair's product within its own, and so in the backward
    pass.

    x [..., n]; gain g (DoRA) [n]; down [n, r]; up [m, r]. The compiler takes it as it is. Of x and g*x only x is
    kept, which other layers or a recipe may have anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, down: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
        z = scale_columns(x, gain, layer)
        hidden = z.to(down.dtype) @ down
        ctx.save_for_backward(x, gain, hidden, down, up)
        ctx.layer = layer
        return layer.product(z, hidden, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, gain, hidden, down, up), layer, grad_x, grad_gain = ctx.saved_tensors, ctx.layer, None, None
        grad_hidden, grad_up = up_gradients(grad.to(up.dtype), hidden, up, layer)
        grad_down = down_gradient(scale_columns(x, gain, layer).to(down.dtype), grad_hidden, down, layer)
        if ctx.needs_input_grad[0] or gain is not None:
            grad_z = layer.input_gradient(grad, grad_hidden, down)
            grad_gain = None if gain is None else sum_columns(grad_z.to(gain.dtype) * x, layer)
            grad_x = scale_columns(grad_z, gain, layer) if ctx.needs_input_grad[0] else None
        return grad_x, grad_gain, grad_down, grad_up, None


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; the meta device, on which a step's memory is counted, knows none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, enabled: bool) -> AbstractContextManager:
    """Autocast as asked, at no cost where it already is so: entering the context takes as long as a small kernel."""
    if autocasts(device_type) == enabled:
        return AS_IT_IS
    return torch.autocast(device_type, enabled=enabled)


def composed(x: Tensor, dropped: Tensor | None, gain: Tensor | None, down: Tensor, up: Tensor,
             layer: nn.Module) -> Tensor:
    """The same sum from differentiable operations, for torch.compile, whose partitioner chooses what to save."""
    y = layer.base_forward(scale_columns(x, gain, layer))
    z = scale_columns((x if dropped is None else dropped).to(down.dtype), gain, layer)
    return y + low_rank_output(low_rank_hidden(z, down, layer), up, layer).to(y.dtype)


# -- the pieces, for [..., n] and for [b, c, h, w] ----------------------------------------------------------------


def readable(layer: nn.Module) -> bool:
    """Whether `weight` is W as an ordinary matrix (our quantised layers make it when asked), so that the input
    gradient is one product with it; another layer is known by its own class."""
    kind = getattr(type(layer), "base_kind", type(layer))
    return kind in (nn.Linear, nn.Conv2d) or issubclass(kind, QuantizedLinear)


def scale_columns(x: Tensor, gain: Tensor | None, layer: nn.Module) -> Tensor:
    """x with input feature (or channel) j times gain[j]; the product is rounded, not the gain, which stays near 1."""
    if gain is None:
        return x
    return (x * (gain[:, None, None] if layer.adapter_convolution else gain)).to(x.dtype)


def sum_columns(x: Tensor, layer: nn.Module) -> Tensor:
    """Sum over everything but the input feature (or channel): [n] or [c]."""
    return x.sum((0, 2, 3)) if layer.adapter_convolution else x.reshape(-1, x.shape[-1]).sum(0)


def kernel(down: Tensor, layer: nn.Module) -> Tensor:
    """[c*k*k, r] -> [r, c, k, k]."""
    return down.t().reshape(-1, layer.in_channels, *layer.kernel_size)


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def low_rank_hidden(z: Tensor, down: Tensor, layer: nn.Module) -> Tensor:
    if layer.adapter_convolution:
        return F.conv2d(z, kernel(down, layer), None, layer.stride, layer.padding, layer.dilation)
    return z @ down


def low_rank_output(hidden: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    return F.conv2d(hidden, up[:, :, None, None]) if layer.adapter_convolution else hidden @ up.t()


def add_low_rank(y: Tensor, hidden: Tensor, up: Tensor, layer: nn.Module) -> None:
    """y += up hidden, in place: y is fresh from the frozen layer."""
    if layer.adapter_convolution or y.dtype != up.dtype or not y.is_contiguous():
        y.add_(low_rank_output(hidden, up, layer))
    else:
        y.view(-1, y.shape[-1]).addmm_(rows(hidden), up.t())


def up_gradients(grad: Tensor, hidden: Tensor, up: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Gradients of the hidden activation and of up [m, r]."""
    if layer.adapter_convolution:
        grad_up = (grad.flatten(2) @ hidden.flatten(2).mT).sum(0)
        return F.conv2d(grad, up.t()[:, :, None, None]), grad_up
    return grad @ up, rows(grad).t() @ rows(hidden)


def down_gradient(z: Tensor, grad_hidden: Tensor, down: Tensor, layer: nn.Module) -> Tensor:
    """Gradient of down [n, r]."""
    if layer.adapter_convolution:
        return _convolution_backward(grad_hidden, z, kernel(down, layer), layer, [False, True])[1].flatten(1).t()
    return rows(z).t() @ rows(grad_hidden)


def hidden_gradient(z: Tensor, grad_hidden: Tensor, down: Tensor, layer: nn.Module) -> Tensor:
    """down^T applied to the hidden gradient: the gradient of z."""
    if layer.adapter_convolution:
        return _convolution_backward(grad_hidden, z, kernel(down, layer), layer, [True, False])[0]
    return grad_hidden @ down.t()


def add_hidden_gradient(grad_base: Tensor, z: Tensor, grad_hidden: Tensor, down: Tensor, layer: nn.Module) -> None:
    if layer.adapter_convolution or grad_base.dtype != down.dtype or not grad_base.is_contiguous():
        grad_base.add_(hidden_gradient(z, grad_hidden, down, layer))
    else:
        grad_base.view(-1, grad_base.shape[-1]).addmm_(rows(grad_hidden), down.t())


def input_gradient(layer: nn.Module, grad: Tensor, x: Tensor) -> Tensor:
    """W^T grad for the frozen layer; a layer whose W cannot be read is run once more under autograd."""
    if not readable(layer):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(layer.base_forward(x), x, grad)[0]
    if isinstance(layer, QuantizedLinear):
        return layer.input_gradient(grad)
    weight = layer.weight.to(grad.dtype)
    if layer.adapter_convolution:
        return _convolution_backward(grad, x.to(grad.dtype), weight, layer, [True, False])[0]
    return grad @ weight


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, layer: nn.Module,
                          wanted: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, layer.stride, layer.padding, layer.dilation, False, [0, 0], 1, [*wanted, False])
