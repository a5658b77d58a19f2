"""Turns any Euclidean optimizer into one on the manifold: what happens before and after its step (StelLA)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer import manifold

Retraction = Callable[[Tensor, Tensor, float], Tensor]  # (x, tentative, scale) -> next x


def _qr_step(x: Tensor, tentative: Tensor, scale: float) -> Tensor:
    return manifold.qr_retraction(x, manifold.tangent_projection(x, (tentative - x) * scale))


RETRACTIONS: dict[str, Retraction] = {
    "polar": manifold.polar_step,
    "exponential": manifold.exponential_step,
    "qr": _qr_step,
}


class ManifoldStep:
    """Before: snapshot, and the gradient in the canonical metric. After: scale, project and retract the update.

    scale_dim d multiplies an update of a [dim, r] factor by sqrt(d/dim), so that columns of every size turn by about
    lr*sqrt(d) a step; 0 leaves updates alone. Two launches a stack before and few after, none waits for the device.
    """

    def __init__(self, leaves: dict[str, Tensor], retraction: str, scale_dim: float) -> None:
        self.leaves, self.retract, self.scale_dim = leaves, RETRACTIONS[retraction], scale_dim
        self.before_update = {key: torch.empty_like(leaf) for key, leaf in leaves.items()}

    def scale(self, dim: int) -> float:
        return (self.scale_dim / dim) ** 0.5 if self.scale_dim else 1.0

    @torch.no_grad()
    def before(self) -> None:
        for key, leaf in self.leaves.items():
            self.before_update[key].copy_(leaf)
            leaf.grad.copy_(manifold.riemannian_gradient(leaf, leaf.grad))

    @torch.no_grad()
    def after(self, skip: Tensor) -> None:
        """skip: a bool on the device; where it is set the factors keep their bits."""
        for key, leaf in self.leaves.items():
            x = self.before_update[key]
            leaf.copy_(torch.where(skip, x, self.retract(x, leaf, self.scale(leaf.shape[1]))))
