"""A GPU's kernels for stacks of tall, narrow matrices, in Triton: products with and between them.

General batched products are made for wider matrices: with them StelLA's step took 2.6 ms more than plain LoRA's on
SDXL, with these 1.6 (tests/bench/README.md). They multiply in whole fp32 (no TF32).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 16  # columns of a program: the fewest that a product of tiles takes; more would not fit its registers
ROWS = 64  # at a time
SUMMED, SUM_WARPS = 128, 2  # rows that one program sums up; few warps, since each then reads a tile less often
WARPS = 4  # of a program that gives a row for each


@triton.jit
def _gram_pieces(left, right, out, dim, r, SQUARE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                 SUMMED: tl.constexpr):
    layer, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, side = tl.arange(0, WIDE), tl.arange(0, WIDE)
    across, square = tl.zeros((WIDE, WIDE), dtype=tl.float32), tl.zeros((WIDE, WIDE), dtype=tl.float32)
    for first in range(piece * SUMMED, piece * SUMMED + SUMMED, ROWS):
        row = first + tl.arange(0, ROWS)
        spot = layer * dim * r + row[:, None] * r + column[None, :]
        inside = (row[:, None] < dim) & (column[None, :] < r)
        a, b = tl.load(left + spot, mask=inside, other=0.0), tl.load(right + spot, mask=inside, other=0.0)
        across = tl.dot(tl.trans(a), b, across, input_precision="ieee")
        if SQUARE:
            square = tl.dot(tl.trans(b), b, square, input_precision="ieee")
    place = out + (layer * tl.num_programs(1) + piece) * (1 + SQUARE) * r * r + side[:, None] * r + column[None, :]
    small = (side[:, None] < r) & (column[None, :] < r)
    tl.store(place, across, mask=small)
    if SQUARE:
        tl.store(place + r * r, square, mask=small)


@triton.jit
def _times(out, one, of_one, layer_one, row_one, column_one, other, of_other, layer_other, row_other, column_other, dim,
           r, ADDS: tl.constexpr, HAS_OTHER: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    layer, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column, side = tl.arange(0, WIDE), tl.arange(0, WIDE)
    spot = layer * dim * r + row[:, None] * r + column[None, :]
    inside = (row[:, None] < dim) & (column[None, :] < r)
    small = (side[:, None] < r) & (column[None, :] < r)
    core = tl.load(of_one + layer * layer_one + side[:, None] * row_one + column[None, :] * column_one, mask=small,
                   other=0.0)
    y = tl.dot(tl.load(one + spot, mask=inside, other=0.0), core, input_precision="ieee")
    if HAS_OTHER:
        core = tl.load(of_other + layer * layer_other + side[:, None] * row_other + column[None, :] * column_other,
                       mask=small, other=0.0)
        y = tl.dot(tl.load(other + spot, mask=inside, other=0.0), core, y, input_precision="ieee")
    if ADDS:  # at the end, so that a small change keeps its digits
        y += tl.load(out + spot, mask=inside, other=0.0)
    tl.store(out + spot, y, mask=inside)


def grams(left: Tensor, right: Tensor, square: bool = False) -> Tensor:
    """left^T right and, if asked for, right^T right: [L, dim, r] twice -> [L, 1 or 2, r, r].

    Sums run over SUMMED rows in fp32, as in `manifold.gram`, and then over the pieces.
    """
    count, dim, rank = left.shape
    pieces = triton.cdiv(dim, SUMMED)
    out = left.new_empty(count, pieces, 2 if square else 1, rank, rank)
    with torch.cuda.device(left.device):
        _gram_pieces[(count, pieces)](left, right, out, dim, rank, square, WIDE, ROWS, SUMMED,
                                      num_warps=SUM_WARPS, num_stages=1)
    return out[:, 0] if pieces == 1 else out.sum(1)


def times_(out: Tensor, x: Tensor, of_x: Tensor, d: Tensor | None = None, of_d: Tensor | None = None,
           add: bool = False) -> Tensor:
    """out (+)= x of_x + d of_d: [L, dim, r] and [L, r, r]; out may be x or d. Returns it."""
    (count, dim, rank), (last, of_last) = x.shape, (x, of_x) if d is None else (d, of_d)
    with torch.cuda.device(x.device):
        _times[(count, triton.cdiv(dim, ROWS))](out, x, of_x, *of_x.stride(), last, of_last, *of_last.stride(), dim,
                                                rank, add, d is not None, WIDE, ROWS, num_warps=WARPS)
    return out


def fits(*stacks: Tensor) -> bool:
    """Whether the kernels take these stacks [L, dim, r]."""
    first = stacks[0]
    return len(first) > 0 and first.shape[2] <= WIDE and works(first.device) and all(
        stack.dtype == torch.float32 and stack.shape == first.shape and stack.is_contiguous() for stack in stacks)


@cache
def works(device: torch.device) -> bool:
    """Whether the kernels can be made and are right on this GPU."""
    return all(_is_right(rank, device) for rank in (5, WIDE))


def _is_right(rank: int, device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    x, d = torch.randn(2, 3, 150, rank, device=device, generator=generator)
    try:
        found = grams(x, d, square=True)
        y = times_(torch.empty_like(x), x, grams(x, d)[:, 0])
        z = times_(x.clone(), x, found[:, 0], d, found[:, 1].mT, add=True)
    except torch.OutOfMemoryError:  # says nothing of the kernels, and would be remembered
        raise
    except Exception:  # of Triton, of the compiler that it calls: torch's own products do
        return False
    x, d = x.double(), d.double()
    once = x @ (x.mT @ d)
    both = x + once + d @ (d.mT @ d)
    return all(torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-3) for found, exact in ((y, once), (z, both)))
