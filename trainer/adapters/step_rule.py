"""What surrounds an optimizer's step: the manifold of StelLA and Stiefel-LoRA, or a preconditioner for LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from trainer import manifold
from trainer.adapters.layout import Layout


class StepRule(Protocol):
    """Both parts run on the device alone."""

    def before(self) -> None:
        """Ahead of `optimizer.step()`, after clipping."""

    def after(self, skip: Tensor) -> None:
        """Behind it; where `skip`, a bool on the device, is set, parameters keep their bits."""


class ManifoldRule:
    """Turns any Euclidean optimizer into one on the manifold (StelLA, section 4).

    Before: snapshot, and the gradient in the canonical metric. After: scale, project and retract the update.
    scale_dim d multiplies the update of a [dim, r] factor by sqrt(d / dim), so that columns of every size turn by
    about lr * sqrt(d) a step; 0 leaves updates alone.
    """

    def __init__(self, leaves: Iterable[Tensor], retraction: str, scale_dim: float) -> None:
        self.leaves, self.retraction, self.scale_dim = list(leaves), retraction, scale_dim
        self.talls = [leaf.new_empty(*leaf.shape[:2], 2 * leaf.shape[2]) for leaf in self.leaves]  # [X D], L dim 2r
        self.starts, self.updates = zip(*(tall.chunk(2, dim=-1) for tall in self.talls))  # views of them
        self.scales = torch.cat([leaf.new_full((len(leaf), 1, 1), self.scale(leaf.shape[1]), dtype=torch.float64)
                                 for leaf in self.leaves])

    def scale(self, dim: int) -> float:
        """Factor on the updates of factors of this size."""
        return (self.scale_dim / dim) ** 0.5 if self.scale_dim else 1.0

    @torch.no_grad()
    def before(self) -> None:
        for leaf, start in zip(self.leaves, self.starts):
            start.copy_(leaf)
            manifold.riemannian_gradient_(start, leaf.grad)

    @torch.no_grad()
    def after(self, skip: Tensor) -> None:
        for leaf, start, update in zip(self.leaves, self.starts, self.updates):
            torch.sub(leaf, start, out=update)
        ends, fine = manifold.advance(self.talls, lambda norm: self.scales, self.retraction)
        taken = ~skip
        for leaf, start, end, good in zip(self.leaves, self.starts, ends, fine):
            torch.where(good & taken, end, start, out=leaf)


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
            grams = torch.cat([manifold.gram(self.leaves[key], self.leaves[key], torch.float64)
                               for key in self.layout.pair_shapes() if key.startswith(kind + ".")])
            eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
            inverse, _ = torch.linalg.inv_ex(grams + self.EPS * eye)
        return inverse[self.order[kind]].to(next(iter(self.leaves.values())).dtype)
