"""StelLA (Li et al. 2025): W + U S V^T with U and V on Stiefel manifolds; and the same without them (TriLoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.adapters.layer import base_matrix
from trainer.adapters.layout import Layout
from trainer.adapters.lora import Stacks, leading_svd, subtracted
from trainer.adapters.stiefel import random_orthonormal
from trainer.manifold import exact_arithmetic, gram, orthonormalize, side_by_side, times

STREAMS = 3  # of the backward pass: on each of them cuBLAS keeps up to 32 MiB for autograd's thread


class StelLA:
    """Forward pair (U S, V^T). U and V of equal dim share one leaf `factor.<dim>` [L, dim, r]: first U's, then V's.

    `core` is S: [layers, r, r], or its diagonal [layers, r], in the order of the up stacks.
    """

    inits = ("default", "random", "zero", "pseudo-zero", "svd-major", "svd-minor")
    manifold: tuple[str, ...] = ("factor",)

    def __init__(self, layout: Layout, diagonal: bool) -> None:
        self.layout, self.diagonal = layout, diagonal
        self.dims = sorted(set(layout.ups) | set(layout.downs))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        layout, rank = self.layout, self.layout.rank
        shapes = {f"factor.{dim}": (sum(self._counts(dim)), dim, rank) for dim in self.dims}
        return shapes | {"core": (len(layout.targets), rank) if self.diagonal else (len(layout.targets), rank, rank)}

    def _counts(self, dim: int) -> list[int]:
        return [len(self.layout.ups.get(dim, ())), len(self.layout.downs.get(dim, ()))]

    def factors(self, leaves: Stacks) -> Stacks:
        """U as `up.<m>` and V as `down.<n>`, views of the leaves."""
        stacks = {}
        for dim in self.dims:
            u, v = leaves[f"factor.{dim}"].split(self._counts(dim))
            stacks |= {f"up.{dim}": u} if len(u) else {}
            stacks |= {f"down.{dim}": v} if len(v) else {}
        return stacks

    def cores(self, leaves: Stacks) -> Stacks:
        """S of the layers of each up stack, views of the leaf."""
        counts = [len(layers) for layers in self.layout.ups.values()]
        return {f"up.{m}": core for m, core in zip(self.layout.ups, leaves["core"].split(counts))}

    def pair(self, leaves: Stacks) -> Stacks:
        """U S by one batched product per size, and V; differentiable in the leaves."""
        counts = [self._counts(dim)[0] for dim in self.dims]
        stacks = Folded.apply(counts, leaves["core"], *(leaves[f"factor.{dim}"] for dim in self.dims))
        named = zip([f"{kind}.{dim}" for kind in ("up", "down") for dim in self.dims], stacks)
        return {key: stack for key, stack in named if len(stack)}

    def start(self, leaves: Stacks, init: str, generator: torch.Generator) -> Stacks | None:
        """default = zero: S = 0, the base model; random: S = I, which moves the base model at once, as published."""
        eye = torch.ones(self.layout.rank) if self.diagonal else torch.eye(self.layout.rank)
        leaves["core"].copy_(torch.zeros_like(eye) if init in ("default", "zero") else eye)
        if init.startswith("svd-"):
            self._start_from_svd(self.factors(leaves), minor=init == "svd-minor")
            return None
        for dim in self.dims:
            leaf = leaves[f"factor.{dim}"]
            leaf.copy_(random_orthonormal(leaf, generator))
        return subtracted(self.pair(leaves)) if init == "pseudo-zero" else None

    def _start_from_svd(self, factors: Stacks, minor: bool) -> None:
        rank = self.layout.rank
        for number, target in enumerate(self.layout.targets):
            weight = base_matrix(target)
            if minor:
                left, _, right = torch.linalg.svd(weight, full_matrices=False)
                left, right = left[:, -rank:], right[-rank:]
            else:
                left, _, right = leading_svd(weight, rank)
            self.layout.slot(factors, "up", number).copy_(orthonormalize(left[None])[0])
            self.layout.slot(factors, "down", number).copy_(orthonormalize(right.t()[None])[0])

    def assign(self, leaves: Stacks, number: int, up: Tensor, down: Tensor) -> None:
        """up = Q_U R_U, down^T = Q_V R_V: U = Q_U, V = Q_V, S = R_U R_V^T (its SVD for a diagonal S); exact."""
        u, r_u = torch.linalg.qr(up.double())
        v, r_v = torch.linalg.qr(down.double().t())
        core = r_u @ r_v.t()
        if self.diagonal:
            left, core, right = torch.linalg.svd(core)
            u, v = u @ left, v @ right.t()
        factors = self.factors(leaves)
        self.layout.slot(factors, "up", number).copy_(u)
        self.layout.slot(factors, "down", number).copy_(v)
        self.layout.slot(self.cores(leaves), "up", number).copy_(core)


class Folded(torch.autograd.Function):
    """U S and V of every size. counts: how many matrices of each factor [L, dim, r] are U's, which come first.

    Sizes are worked on side by side. The gradient of S, U^T g, is summed piece by piece: down whole tall matrices it
    would take a GPU longer than everything else here. Those of U and V go into one tensor, without being joined.
    """

    @staticmethod
    def forward(ctx: Any, counts: Sequence[int], core: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.counts = counts
        ctx.save_for_backward(core, *factors)
        with exact_arithmetic(core.device):
            ups = side_by_side([partial(_times, factor[:count], part)
                                for factor, count, part in zip(factors, counts, core.split(counts))])
        return (*ups, *(factor[count:] for factor, count in zip(factors, counts)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        core, *factors = ctx.saved_tensors
        fresh = [torch.empty_like(factor) for factor in factors]
        ups, downs = grads[:len(factors)], grads[len(factors):]
        with exact_arithmetic(core.device):
            of_core = side_by_side([
                partial(_unfold, factor, part, up, down, grad)
                for factor, part, up, down, grad in zip(factors, core.split(ctx.counts), ups, downs, fresh)], STREAMS)
        return (None, torch.cat(of_core), *fresh)


def _times(u: Tensor, core: Tensor, out: Tensor | None = None) -> Tensor:
    """U S, or U diag(S)."""
    return torch.mul(u, core.unsqueeze(1), out=out) if core.ndim == 2 else times(u, core, out)


def _unfold(factor: Tensor, core: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> Tensor:
    """From the gradients of U S and V: that of [U; V], written to `grad`, and that of S."""
    count = len(up)
    grad[count:].copy_(down)
    if not count:
        return torch.empty_like(core)
    _times(up, core if core.ndim == 2 else core.mT, out=grad[:count])
    return (factor[:count] * up).sum(1) if core.ndim == 2 else gram(factor[:count], up)


class TriLoRA(StelLA):
    """The three factors without the manifold, for comparison (MoSLoRA, TriLoRA)."""

    manifold = ()


def rank_budget(step: int, steps: int, rank: int, target: float) -> float:
    """Average rank at a step: the full rank for a fifth of the run, then cubically down to the target at seven tenths.

    The schedule of AdaLoRA (Zhang et al. 2303.10512, eq. 12).
    """
    begin, end = steps // 5, 7 * steps // 10
    left = 1.0 - min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    return target + (rank - target) * left**3
