"""DoRA (Liu et al. 2024) along the input axis: W' = magnitude * (W + delta) / |W + delta|, per input column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.adapters.layer import base_matrix, transposed_product
from trainer.adapters.layout import Layout

Stacks = dict[str, Tensor]


class Magnitude:
    """Column norms without an m x n temporary, and the gain magnitude / norm that scales a layer's inputs.

    For a convolution a column is an input channel with all kernel positions, as ComfyUI, Forge and A1111 read it.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.layout = layout
        squares = [base_matrix(target).square().sum(0).to(dtype) for target in layout.targets]  # |W_j|^2
        self.base_squares = {key: torch.stack([squares[number] for number in layout.members(key)])
                             for key in layout.pair_shapes() if key.startswith("down.")}  # L n

    @torch.no_grad()
    def norms(self, stacks: Stacks, ups: Sequence[Tensor]) -> Stacks:
        """|W + up down| per input, `magnitude.<size>` [L, size]: |W_j|^2 + 2 <(W^T up)_j, d_j> + d_j^T (up^T up) d_j.

        ups: the layers' `up` again, in any dtype, for the product with W, the only work that grows with m n.
        """
        layout = self.layout
        cross = [transposed_product(target, up) for target, up in zip(layout.targets, ups)]  # n r
        grams = {key: stack.mT @ stack for key, stack in stacks.items() if key.startswith("up.")}
        gram_of = layout.by_layer(grams, "up")
        squares: list[Tensor] = [grams[next(iter(grams))]] * len(cross)
        for key, base in self.base_squares.items():
            members, down = layout.members(key), stacks[key]
            gram = torch.stack([gram_of[number] for number in members])
            mixed = 2 * torch.stack([cross[number] for number in members]).to(down.dtype) + down @ gram
            for number, piece in zip(members, (base + (mixed * down).sum(-1)).unbind(0)):
                squares[number] = piece
        return {key: self._stacked(squares, key) for key in layout.magnitude_shapes()}

    def _stacked(self, squares: Sequence[Tensor], key: str) -> Tensor:
        size = int(key.split(".")[1])
        rows = [squares[number] if len(squares[number]) == size else squares[number].view(size, -1).sum(1)
                for number in self.layout.members(key)]
        stacked = torch.stack(rows)
        return stacked.clamp_min(torch.finfo(stacked.dtype).tiny).sqrt()

    def start(self, stacks: Stacks) -> Stacks:
        """Magnitudes `magnitude.<size>` [L, size] that leave the layers at W + delta of the start."""
        return self.norms(stacks, self.layout.by_layer(stacks, "up"))

    def gains(self, stacks: Stacks, ups: Sequence[Tensor], values: Stacks) -> list[Tensor]:
        """magnitude / norm per layer, [n] or [c]; the norm is a constant for the gradient (DoRA, section 4.3)."""
        gains = {key: values[key] / norm for key, norm in self.norms(stacks, ups).items()}
        return self.layout.by_layer(gains, "magnitude")
