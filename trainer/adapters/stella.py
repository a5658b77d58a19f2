"""StelLA (Li et al. 2025): W + U S V^T with U and V on Stiefel manifolds; and the same without them (TriLoRA)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.adapters.layer import base_matrix
from trainer.adapters.layout import Layout
from trainer.adapters.lora import Stacks, leading_svd, subtracted
from trainer.adapters.stiefel import random_orthonormal
from trainer.manifold import orthonormalize


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
        stacks = self.factors(leaves)
        for key, core in self.cores(leaves).items():
            stacks[key] = stacks[key] * core.unsqueeze(1) if self.diagonal else stacks[key] @ core
        return {key: stacks[key] for key in self.layout.pair_shapes()}

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


class TriLoRA(StelLA):
    """The three factors without the manifold, for comparison (MoSLoRA, TriLoRA)."""

    manifold = ()


def rank_budget(step: int, steps: int, rank: int, target: float) -> float:
    """Average rank at a step: the full rank for a fifth of the run, then cubically down to the target at seven tenths.

    The schedule of AdaLoRA (Zhang et al. 2023, eq. 12).
    """
    begin, end = steps // 5, 7 * steps // 10
    left = 1.0 - min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    return target + (rank - target) * left**3
