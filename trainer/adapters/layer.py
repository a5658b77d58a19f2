"""Routes a frozen layer's forward through its low-rank pair, without changing module or state_dict names."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.adapters.fused import FusedLayer, PairedProduct, composed, readable
from trainer.adapters.target import Target


class AdaptedLayer:
    """Mixed in before a layer's own class; the slices of the bank are plain attributes, None when switched off."""

    base_kind: type[nn.Module]  # the class the layer had
    adapter_down: Tensor | None = None  # n r
    adapter_up: Tensor | None = None  # m r
    adapter_gain: Tensor | None = None  # n, DoRA: magnitude / column norm
    adapter_dropout: float = 0.0
    adapter_convolution: bool = False

    def base_forward(self, x: Tensor) -> Tensor:
        """The frozen layer alone."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias + up (down x). Dropout acts on the input of `down`, where gradients are recorded.

        Its mask comes from torch's generator, which activation checkpointing (the non-reentrant one: slices are no
        leaves) restores before it recomputes.
        """
        down, up = self.adapter_down, self.adapter_up
        if down is None:
            return super().forward(x)
        dropped = None
        if self.adapter_dropout and torch.is_grad_enabled():
            dropped = F.dropout(x, self.adapter_dropout)
        if dropped is None and getattr(self, "adds_pair", False):
            return PairedProduct.apply(x, self.adapter_gain, down, up, self)
        if torch.compiler.is_compiling():
            return composed(x, dropped, self.adapter_gain, down, up, self)
        return FusedLayer.apply(x, dropped, self.adapter_gain, down, up, self)


@cache
def adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's class with `AdaptedLayer` in front.

    Swapping the class, rather than patching `forward` on each instance, gives the compiler one function for all.
    """
    return type(f"Adapted{kind.__name__}", (AdaptedLayer, kind), {"base_kind": kind})


def install(target: Target, dropout: float) -> None:
    """Make the target's modules adapted ones; their weights are frozen."""
    for module in target.modules:
        _install(target, module, dropout)


def _install(target: Target, module: nn.Module, dropout: float) -> None:
    if "forward" in vars(module):
        raise RuntimeError(f"{target.name}: its forward is patched on the instance; install adapters before such hooks")
    if isinstance(module, AdaptedLayer):
        raise RuntimeError(f"{target.name} already has an adapter")
    module.requires_grad_(False)
    module.__class__ = adapted_class(type(module))
    module.adapter_dropout, module.adapter_convolution = dropout, target.convolution


def remove(target: Target) -> None:
    """Give the target's modules their own classes back."""
    for module in target.modules:
        for name in ("adapter_down", "adapter_up", "adapter_gain", "adapter_dropout", "adapter_convolution"):
            vars(module).pop(name, None)
        module.__class__ = type(module).base_kind


def switch(target: Target, down: Tensor | None, up: Tensor | None, gain: Tensor | None) -> None:
    """Hand a layer its slices, or None for the base model; stacked layers share `down` and have their rows of `up`."""
    stacked = target.parts and up is not None
    ups = up.split([part.out_features for part in target.parts]) if stacked else [up] * len(target.modules)
    for module, rows in zip(target.modules, ups):
        module.adapter_down, module.adapter_up, module.adapter_gain = down, rows, gain


def _bring(module: nn.Module) -> None:
    """Have a layer's weight here that is shared between GPUs and comes only when it is used."""
    if (fetch := vars(module).get("fetch_weights")) is not None:
        fetch()


def transposed_product(target: Target, up: Tensor) -> Tensor:
    """W^T up: [m, r] -> [n, r]; a layer whose W cannot be read gives it as its input gradient."""
    if target.parts:
        rows = up.split([part.out_features for part in target.parts])
        return sum(transposed_product(target.part(part), piece) for part, piece in zip(target.parts, rows))
    module = target.module
    _bring(module)
    if readable(module):
        weight = module.weight.detach().flatten(1)
        return weight.t() @ up.to(weight.dtype)
    forward = module.base_forward if isinstance(module, AdaptedLayer) else module.forward
    with torch.enable_grad():
        probe = torch.zeros(up.shape[1], target.columns, device=up.device, dtype=up.dtype, requires_grad=True)
        return torch.autograd.grad(forward(probe), probe, up.t().contiguous())[0].t()


def base_matrix(target: Target) -> Tensor:
    """W as [m, n], in fp32 or better."""
    if target.parts:
        return torch.cat([base_matrix(target.part(part)) for part in target.parts])
    module = target.module
    _bring(module)
    if not readable(module):
        return transposed_product(target, torch.eye(target.rows, device=module.weight.device)).t()
    weight = module.weight.detach().flatten(1)
    return weight if weight.dtype == torch.float64 else weight.float()
