"""The Inception network of FID: TensorFlow's graph of 2015-12-05 up to its 2048 pooled features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.metrics import weights

SIZE = 299
DIM = 2048

# A block is its branches, whose outputs are joined; a branch is a chain of steps: a convolution (name,
# channels, kernel), with a stride of 2 where a fourth entry says so, a pooling by name, or a fork of
# convolutions side by side.
Conv = tuple[str, int, int | tuple[int, int]] | tuple[str, int, int | tuple[int, int], int]
Step = Conv | str | list[Conv]
Block = list[list[Step]]

DOUBLE: list[Step] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3)]


def _a(pooled: int) -> Block:
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [*DOUBLE, ("branch3x3dbl_3", 96, 3)],
            ["average", ("branch_pool", pooled, 1)]]


def _c(width: int) -> Block:
    row, column = (1, 7), (7, 1)
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
            [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, column), ("branch7x7dbl_3", width, row),
             ("branch7x7dbl_4", width, column), ("branch7x7dbl_5", 192, row)],
            ["average", ("branch_pool", 192, 1)]]


def _e(pool: str) -> Block:
    row, column = (1, 3), (3, 1)
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)]],
            [pool, ("branch_pool", 192, 1)]]


BLOCKS: dict[str, Block] = {
    "Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64),
    "Mixed_6a": [[("branch3x3", 384, 3, 2)], [*DOUBLE, ("branch3x3dbl_3", 96, 3, 2)], ["halve"]],
    "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192),
    "Mixed_7a": [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                 [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                  ("branch7x7x3_4", 192, 3, 2)], ["halve"]],
    # The published graph pools by maximum in its last block, unlike the paper; FID is defined by the graph.
    "Mixed_7b": _e("average"), "Mixed_7c": _e("maximum"),
}
# name, channels in, out, kernel, stride, padding; "halve" stands between
STEM: list[tuple[str, int, int, int, int, int] | str] = [
    ("Conv2d_1a_3x3", 3, 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 32, 3, 1, 0), ("Conv2d_2b_3x3", 32, 64, 3, 1, 1),
    "halve",
    ("Conv2d_3b_1x1", 64, 80, 1, 1, 0), ("Conv2d_4a_3x3", 80, 192, 3, 1, 0), "halve"]


class Inception(nn.Module):
    """Features [b, 2048] of pictures [b, 3, h, w] in 0…255."""

    def __init__(self) -> None:
        super().__init__()
        self.convs: dict[str, nn.Conv2d] = {}  # by the names of the published file
        for step in STEM:
            if not isinstance(step, str):
                name, before, after, kernel, stride, padding = step
                self.convs[name] = nn.Conv2d(before, after, kernel, stride, padding)
        channels = 192
        for name, block in BLOCKS.items():
            channels = sum(self._add_branch(name, branch, channels) for branch in block)
        self.registered = nn.ModuleList(self.convs.values())

    def _add_branch(self, block: str, branch: list[Step], channels: int) -> int:
        """Add a branch's convolutions; returns how many channels come out of it."""
        for step in branch:
            fork = step if isinstance(step, list) else [] if isinstance(step, str) else [step]
            for name, out, kernel, *stride in fork:
                sides = (kernel, kernel) if isinstance(kernel, int) else kernel
                padding = (0, 0) if stride else (sides[0] // 2, sides[1] // 2)
                self.convs[f"{block}.{name}"] = nn.Conv2d(channels, out, sides, *stride, padding=padding)
            channels = sum(out for _, out, *_ in fork) or channels
        return channels

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return F.relu(self.convs[name](x))

    def _branch(self, block: str, branch: list[Step], x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _pool(step, x)
            elif isinstance(step, list):
                x = torch.cat([self._conv(f"{block}.{conv[0]}", x) for conv in step], 1)
            else:
                x = self._conv(f"{block}.{step[0]}", x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = (resize(x, SIZE) - 128.0) / 128.0  # b 3 299 299
        for step in STEM:
            x = _pool(step, x) if isinstance(step, str) else self._conv(step[0], x)
        for name, block in BLOCKS.items():  # b 192 35 35 → b 2048 8 8
            x = torch.cat([self._branch(name, branch, x) for branch in block], 1)
        return x.mean((2, 3))  # b 2048


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == "average":  # TensorFlow counts no padding
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "maximum":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.max_pool2d(x, 3, stride=2)


def resize(x: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 (and torch-fidelity) does it: no half-pixel centres, no antialiasing."""
    for dim in (2, 3):
        length = x.shape[dim]
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        share = (at - low).view(-1, *[1] * (3 - dim))
        left, right = x.index_select(dim, low), x.index_select(dim, high)
        x = left + (right - left) * share
    return x


def load(path: Path) -> Inception:
    """The network with the weights of `path`. Raises `UserError` unless it has the published layout."""
    net = Inception()
    layers = {f"{name}.conv": (f"{name}.bn", conv) for name, conv in net.convs.items()}
    weights.fill(layers, weights.load(path), path, spare=("fc.weight", "fc.bias"))
    return net
