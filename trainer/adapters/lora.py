"""LoRA (Hu et al. 2021): up [m, r] and down [r, n], both free; PiSSA and OLoRA starts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.adapters.layer import base_matrix
from trainer.adapters.layout import Layout

Stacks = dict[str, Tensor]
FULL_SVD_SIZE = 2048  # smaller side up to which a full SVD is quick


class LoRA:
    """Forward pair (up, down) = the parameters themselves."""

    inits = ("default", "pissa", "olora")
    manifold: tuple[str, ...] = ()  # kinds of leaves whose matrices are orthonormal

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.layout.pair_shapes()

    def pair(self, leaves: Stacks) -> Stacks:
        """The stacks of the forward pair, differentiable in the leaves."""
        return {key: leaves[key] for key in self.layout.pair_shapes()}

    def factors(self, leaves: Stacks) -> Stacks:
        """The two factors as `up.<m>` and `down.<n>`."""
        return self.pair(leaves)

    def start(self, leaves: Stacks, init: str, generator: torch.Generator) -> Stacks | None:
        """Fill the leaves; returns the frozen pair that the start subtracts, if it has one."""
        if init == "default":
            for key, leaf in leaves.items():
                if key.startswith("down."):  # Kaiming uniform with a = sqrt(5), as in the paper's code: U(+-1/sqrt(n))
                    noise = torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype)
                    leaf.copy_((2 * noise - 1) / math.sqrt(leaf.shape[1]))
            return None
        decompose = {"pissa": pissa, "olora": olora}[init]
        for number, target in enumerate(self.layout.targets):
            up, down = decompose(base_matrix(target), self.layout.rank)
            self.layout.slot(leaves, "up", number).copy_(up)
            self.layout.slot(leaves, "down", number).copy_(down.t())
        return subtracted(self.pair(leaves))

    def assign(self, leaves: Stacks, number: int, up: Tensor, down: Tensor) -> None:
        """Set layer `number` to exactly up [m, r] @ down [r, n]."""
        self.layout.slot(leaves, "up", number).copy_(up)
        self.layout.slot(leaves, "down", number).copy_(down.t())


def subtracted(pair: Stacks) -> Stacks:
    """A frozen copy of a pair that cancels it: (-up, down)."""
    return {key: -stack.detach() if key.startswith("up.") else stack.detach().clone() for key, stack in pair.items()}


def pissa(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Principal singular vectors scaled by sqrt(sigma) on both sides (Meng et al. 2024)."""
    left, values, right = leading_svd(weight, rank)
    return left * values.sqrt(), values.sqrt().unsqueeze(1) * right


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R of W = QR (Büyükakyüz 2024)."""
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]


def leading_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """First singular triples of [m, n]; of large matrices by power iterations, in seconds instead of minutes."""
    if min(weight.shape) <= FULL_SVD_SIZE:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)  # its probe is random; a start is a function of the preset alone
        left, values, right = torch.svd_lowrank(weight, q=min(2 * rank + 8, *weight.shape), niter=16)
    return left[:, :rank], values[:rank], right[:, :rank].t()
