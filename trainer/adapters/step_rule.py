"""What surrounds an optimizer's step: the manifold of StelLA and Stiefel-LoRA, or a preconditioner for LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from trainer import manifold
from trainer.adapters.layout import Layout


class StepRule(Protocol):
    """Both parts run on the device alone."""

    def moved(self, leaf: Tensor) -> Tensor:
        """What the optimizer moves for a leaf: the leaf itself, or a tensor with the leaf's gradient."""

    def before(self) -> None:
        """Ahead of `optimizer.step()`, after clipping."""

    def after(self, skip: Tensor, measure: bool) -> None:
        """Behind it; where `skip`, a bool on the device, is set, parameters keep their bits. measure: whether rounding
        of the steps before is measured and corrected."""


class ManifoldRule:
    """Turns any Euclidean optimizer into one on the manifold (StelLA, section 4).

    Before: the gradient in the canonical metric. The optimizer moves a zero in the factor's place, so that what it
    leaves there is the update, with all its digits and without a copy of the factor. After: scale, project and
    retract the update.
    scale_dim d multiplies the update of a [dim, r] factor by sqrt(d / dim), so that columns of every size turn by
    about lr * sqrt(d) a step; 0 leaves updates alone.
    """

    def __init__(self, leaves: Iterable[Tensor], retraction: str, scale_dim: float) -> None:
        self.leaves, self.retraction, self.scale_dim = list(leaves), retraction, scale_dim
        self.updates = [torch.zeros_like(leaf, requires_grad=False) for leaf in self.leaves]
        for leaf, update in zip(self.leaves, self.updates):
            update.grad = leaf.grad
        self.scales = torch.cat([leaf.new_full((len(leaf), 1, 1), self.scale(leaf.shape[1]), dtype=torch.float64)
                                 for leaf in self.leaves])

    def scale(self, dim: int) -> float:
        """Factor on the updates of factors of this size."""
        return (self.scale_dim / dim) ** 0.5 if self.scale_dim else 1.0

    def moved(self, leaf: Tensor) -> Tensor:
        return next((update for own, update in zip(self.leaves, self.updates) if own is leaf), leaf)

    @torch.no_grad()
    def before(self) -> None:
        manifold.side_by_side([partial(manifold.riemannian_gradient_, leaf, leaf.grad) for leaf in self.leaves])

    @torch.no_grad()
    def after(self, skip: Tensor, measure: bool) -> None:
        manifold.advance_(self.leaves, self.updates, lambda norm: self.scales, self.retraction, measure=measure,
                          skip=skip)
        torch._foreach_zero_(self.updates)


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

    def moved(self, leaf: Tensor) -> Tensor:
        return leaf

    @torch.no_grad()
    def before(self) -> None:
        inverses = {"up": self._inverse_grams("down"), "down": self._inverse_grams("up")}
        for kind, inverse in inverses.items():
            stacks = [self.leaves[key] for key in self.layout.pair_shapes() if key.startswith(kind + ".")]
            pieces = inverse[self.places[kind]].split([len(stack) for stack in stacks])
            for stack, piece in zip(stacks, pieces):
                stack.grad.copy_(stack.grad @ piece)

    def after(self, skip: Tensor, measure: bool) -> None:
        """Nothing: the factors are free."""

    def _inverse_grams(self, kind: str) -> Tensor:
        with manifold.exact_arithmetic(self.order[kind].device):
            grams = torch.cat([manifold.gram(self.leaves[key], self.leaves[key], torch.float64)
                               for key in self.layout.pair_shapes() if key.startswith(kind + ".")])
            eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
            inverse, _ = torch.linalg.inv_ex(grams + self.EPS * eye)
        return inverse[self.order[kind]].to(next(iter(self.leaves.values())).dtype)
