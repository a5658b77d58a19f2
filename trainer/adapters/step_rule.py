"""What surrounds an optimizer's step: the manifold of StelLA and Stiefel-LoRA, or a preconditioner for LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from trainer import manifold
from trainer.adapters.layout import Layout

Retraction = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float]], list[Tensor]]


class StepRule(Protocol):
    """Both parts run on the device alone."""

    def before(self) -> None:
        """Ahead of `optimizer.step()`, after clipping."""

    def after(self, skip: Tensor) -> None:
        """Behind it; where `skip`, a bool on the device, is set, parameters keep their bits."""


RETRACTIONS: dict[str, Retraction] = {
    "polar": manifold.polar_step,
    "exponential": manifold.exponential_step,
    "qr": manifold.qr_step,
}


class ManifoldRule:
    """Turns any Euclidean optimizer into one on the manifold (StelLA, section 4).

    Before: snapshot, and the gradient in the canonical metric. After: scale, project and retract the update.
    scale_dim d multiplies the update of a [dim, r] factor by sqrt(d / dim), so that columns of every size turn by
    about lr * sqrt(d) a step; 0 leaves updates alone.
    """

    def __init__(self, leaves: Iterable[Tensor], retraction: str, scale_dim: float) -> None:
        self.leaves, self.retract, self.scale_dim = list(leaves), RETRACTIONS[retraction], scale_dim
        self.snapshots = [torch.empty_like(leaf) for leaf in self.leaves]

    def scale(self, dim: int) -> float:
        """Factor on the updates of factors of this size."""
        return (self.scale_dim / dim) ** 0.5 if self.scale_dim else 1.0

    @torch.no_grad()
    def before(self) -> None:
        torch._foreach_copy_(self.snapshots, self.leaves)
        for leaf in self.leaves:
            leaf.grad.copy_(manifold.riemannian_gradient(leaf, leaf.grad))

    @torch.no_grad()
    def after(self, skip: Tensor) -> None:
        nexts = self.retract(self.snapshots, self.leaves, [self.scale(leaf.shape[1]) for leaf in self.leaves])
        for leaf, x, y in zip(self.leaves, self.snapshots, nexts):
            torch.where(skip, x, y, out=leaf)


class PairPreconditioner:
    """Riemannian-preconditioned LoRA (Zhang and Pilanci 2024, arXiv 2402.02347): ScaledAdamW's gradients.

    grad up <- grad up (down down^T + eps I)^-1, grad down <- (up^T up + eps I)^-1 grad down.
    """

    EPS = 1e-6

    def __init__(self, leaves: dict[str, Tensor], layout: Layout) -> None:
        self.leaves, self.layout = leaves, layout
        device = next(iter(leaves.values())).device
        self.order = {kind: layout.order(kind, device) for kind in ("up", "down")}
        self.places = {kind: self.order[kind].argsort() for kind in ("up", "down")}  # layer numbers, stack by stack

    @torch.no_grad()
    def before(self) -> None:
        inverses = {"up": self._inverse_grams("down"), "down": self._inverse_grams("up")}
        for kind, inverse in inverses.items():
            stacks = [self.leaves[key] for key in self.layout.pair_shapes() if key.startswith(kind + ".")]
            pieces = inverse[self.places[kind]].split([len(stack) for stack in stacks])
            for stack, piece in zip(stacks, pieces):
                stack.grad.copy_(stack.grad @ piece)

    def after(self, skip: Tensor) -> None:
        """Nothing: the factors are free."""

    def _inverse_grams(self, kind: str) -> Tensor:
        with manifold.exact_arithmetic(self.order[kind].device):
            grams = torch.cat([self.leaves[key].mT @ self.leaves[key] for key in self.layout.pair_shapes()
                               if key.startswith(kind + ".")]).double()
            eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
            inverse, _ = torch.linalg.inv_ex(grams + self.EPS * eye)
        return inverse[self.order[kind]].to(next(iter(self.leaves.values())).dtype)
