"""Stiefel-LoRA (Park et al. 2025): LoRA whose up factor B is orthonormal and whose down factor A is free."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.adapters.lora import LoRA, Stacks
from trainer.manifold import orthonormalize


class StiefelLoRA(LoRA):
    """Forward pair (B, A): B on St(r, m) starts random, A starts at zero, so the base model is unchanged."""

    inits = ("default",)
    manifold = ("up",)

    def start(self, leaves: Stacks, init: str, generator: torch.Generator) -> Stacks | None:
        for key, leaf in leaves.items():
            if key.startswith("up."):
                leaf.copy_(random_orthonormal(leaf, generator))
            else:
                leaf.zero_()
        return None

    def assign(self, leaves: Stacks, number: int, up: Tensor, down: Tensor) -> None:
        """Absorb: up = Q R, B = Q, A = R down; exact."""
        q, r = torch.linalg.qr(up.double())
        super().assign(leaves, number, q, r @ down.double())


def random_orthonormal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on the Stiefel manifold, in the shape, dtype and device of `like` [L, dim, r]."""
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return orthonormalize(noise.to(like.device)).to(like.dtype)
