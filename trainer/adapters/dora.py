"""DoRA (Liu et al. 2024) along the input axis: W' = magnitude * (W + delta) / |W + delta|, per input column."""

from __future__ import annotations

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
        squares: list[Tensor] = []
        for target in layout.targets:
            squares.append(base_matrix(target).square().sum(0).to(dtype))
        self.base_squares = squares  # n, or c*k*k: |W_j|^2

    @torch.no_grad()
    def norms(self, stacks: Stacks) -> list[Tensor]:
        """|W + up down| per input [n] or [c], layer by layer: |W_j|^2 + 2 <(up^T W)_j, d_j> + d_j^T (up^T up) d_j."""
        ups, downs = self.layout.by_layer(stacks, "up"), self.layout.by_layer(stacks, "down")
        norms = []
        for target, up, down, base in zip(self.layout.targets, ups, downs, self.base_squares):
            cross = transposed_product(target, up).to(down.dtype)  # n r
            squares = base + ((2 * cross + down @ (up.t() @ up)) * down).sum(-1)
            squares = squares.unflatten(0, (target.inputs, -1)).sum(-1)
            norms.append(squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt())
        return norms

    def start(self, stacks: Stacks) -> Stacks:
        """Magnitudes `magnitude.<n>` [L, n] that make the adapted layer equal to W + delta of the start."""
        norms = self.norms(stacks)
        return {key: torch.stack([norms[number] for number in self.layout.members(key)])
                for key in self.layout.magnitude_shapes()}

    def gains(self, stacks: Stacks, values: Stacks) -> list[Tensor]:
        """magnitude / norm per layer; the norm is a constant for the gradient, as in DoRA section 4.3."""
        magnitudes = {key: values[key] for key in self.layout.magnitude_shapes()}
        return [magnitude / norm for magnitude, norm in zip(self.layout.by_layer(magnitudes, "magnitude"),
                                                            self.norms(stacks))]
