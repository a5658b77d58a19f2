"""The GPU's kernels for products of 8-bit codes, in Triton: one makes codes of rows; the other makes the product, with
scales, bias and a product of low rank in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trainer.quantize import linear

# Rows and columns of the output, and columns of x, that a program works on at a time; its warps, and how many loads are
# under way. The first was the fastest of several on an H200; the second is for processors with less memory of their own
# or without its loads.
LARGE = {"ROWS": 128, "COLUMNS": 128, "DEEP": 128, "num_warps": 4, "num_stages": 3}
SMALL = {"ROWS": 128, "COLUMNS": 128, "DEEP": 64, "num_warps": 8, "num_stages": 3}
LARGE_NEEDS = 160 * 1024  # bytes of a multiprocessor's memory
DESCRIPTORS_FROM = 9  # compute capability that loads and stores whole tiles by themselves
BAND = 8  # tiles in a column that follow one another, so that they find each other's loads in the cache
RANKS, FEWEST = 64, 16  # columns of the low-rank product at a time: most, in 16 bits, and what a product of tiles takes
PART = 2048  # of a row that a program holds at a time
LONG = 16384  # a row that takes more warps: the programs at work then hold few enough to find them in the cache again
TO_WHOLE = 1.5 * 2**23  # added to a number of fp32 far below it, it leaves the nearest integer in the lowest bits


@triton.jit(do_not_specialize=["m"])  # one kernel for all numbers of rows
def _tiles(x, codes, own, scale, bias, hidden, factor, out, m, n, k, r, scale_step,
           HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAIR: tl.constexpr, RANK: tl.constexpr,
           INTEGERS: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           DEEP: tl.constexpr, BAND: tl.constexpr):
    across, down = tl.cdiv(n, COLUMNS), tl.cdiv(m, ROWS)
    first = tl.program_id(0) // (BAND * across) * BAND
    tall = min(down - first, BAND)
    inside = tl.program_id(0) % (BAND * across)
    top, left = (first + inside % tall) * ROWS, (inside // tall) * COLUMNS
    row, column, deep = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS), tl.arange(0, DEEP)
    whole: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    total = tl.zeros((ROWS, COLUMNS), dtype=whole)
    near, wide = (row % m).to(tl.int64), (column % n).to(tl.int64)  # what is outside repeats, and is not stored
    for at in range(0, k, DEEP):
        if TILES:
            total = tl.dot(x.load([top, at]), codes.load([left, at]).T, total, out_dtype=whole)
        else:
            a, b = x + near[:, None] * k + at + deep[None, :], codes + wide[None, :] * k + at + deep[:, None]
            if EVEN:
                total = tl.dot(tl.load(a), tl.load(b), total, out_dtype=whole)
            else:
                total = tl.dot(tl.load(a, mask=deep[None, :] < k - at, other=0.0),
                               tl.load(b, mask=deep[:, None] < k - at, other=0.0), total, out_dtype=whole)
    y = total.to(tl.float32) * tl.load(own + near)[:, None]
    if HAS_SCALE:
        y *= tl.load(scale + wide * scale_step)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + wide).to(tl.float32)[None, :]
    if HAS_PAIR:
        for at in range(0, r, RANK):
            rank = at + tl.arange(0, RANK)
            one = tl.load(hidden + near[:, None] * r + rank[None, :], mask=rank[None, :] < r, other=0.0)
            other = tl.load(factor + wide[None, :] * r + rank[:, None], mask=rank[:, None] < r, other=0.0)
            y = tl.dot(one, other, y, input_precision="ieee")
    if TILES:
        out.store([top, left], y.to(out.dtype))
    else:
        spot = out + row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(spot, y.to(out.dtype.element_ty), mask=(row[:, None] < m) & (column[None, :] < n))


@triton.jit
def _rows(x, gain, codes, own, k, step, gain_step, HAS_GAIN: tl.constexpr, INTEGERS: tl.constexpr, TOP: tl.constexpr,
          LEAST: tl.constexpr, TO_WHOLE: tl.constexpr, WIDE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    most, odd = tl.zeros((WIDE,), dtype=tl.float32), tl.zeros((WIDE,), dtype=tl.float32)
    for at in range(0, k, WIDE):
        inside = column < k - at
        y = tl.load(x + row * step + at + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_GAIN:
            y *= tl.load(gain + (at + column) * gain_step, mask=inside, other=0.0)
        most = tl.maximum(most, tl.abs(y))
        odd += y * 0.0  # NaN where y is, which the largest number passes over, or where y is infinite
    scale = tl.maximum(tl.max(most, 0), LEAST) / TOP + tl.sum(odd, 0)
    for at in range(0, k, WIDE):  # what was just read is near
        inside = column < k - at
        y = tl.load(x + row * step + at + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_GAIN:
            y *= tl.load(gain + (at + column) * gain_step, mask=inside, other=0.0)
        y *= 1 / scale  # the largest may come out a last bit above TOP, which rounds to it
        if INTEGERS:
            code = (y + TO_WHOLE).to(tl.int32, bitcast=True).to(tl.int8)  # the nearest integer, in its lowest bits
        else:
            code = y.to(codes.dtype.element_ty)
        tl.store(codes + row * k + at + column, code, mask=inside)
    tl.store(own + row, scale)


def rows_to_codes(x: Tensor, gain: Tensor | None, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `codes_of_rows`, on the GPU that holds x."""
    m, k = x.shape
    wide = min(triton.next_power_of_2(k), PART)
    warps = 4 if wide < PART else 8 if k < LONG else 16
    x = x if x.stride(1) == 1 else x.contiguous()
    codes, own = torch.empty(m, k, dtype=kind, device=x.device), x.new_empty(m, 1, dtype=torch.float32)
    with torch.cuda.device(x.device):
        _rows[(m,)](x, own if gain is None else gain, codes, own, k, x.stride(0),
                    0 if gain is None or gain.numel() == 1 else 1, gain is not None, kind == torch.int8,
                    linear.top_of(kind), linear.LEAST, TO_WHOLE, wide, num_warps=warps)
    return codes, own


def product(x: Tensor, codes: Tensor, own: Tensor, scale: Tensor | None, bias: Tensor | None, hidden: Tensor | None,
            factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `product_of_codes`, on the GPU that holds x."""
    (m, k), n, rank = x.shape, len(codes), 0 if hidden is None else hidden.shape[1]
    properties = torch.cuda.get_device_properties(x.device)
    tiles = properties.major >= DESCRIPTORS_FROM
    size = LARGE if tiles and properties.shared_memory_per_block_optin >= LARGE_NEEDS else SMALL
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    sides = size["ROWS"], size["COLUMNS"], size["DEEP"]
    given = [x.contiguous(), codes.contiguous(), out]
    if tiles:
        blocks = [(sides[0], sides[2]), (sides[1], sides[2]), (sides[0], sides[1])]
        given = [TensorDescriptor.from_tensor(tensor, list(block)) for tensor, block in zip(given, blocks)]
    pair = [own, own] if hidden is None else [hidden.contiguous(), factor.contiguous()]
    most = RANKS if pair[0].element_size() == 2 else FEWEST  # more of fp32 than that need 160 KB and spill
    with torch.cuda.device(x.device):
        _tiles[(triton.cdiv(m, sides[0]) * triton.cdiv(n, sides[1]),)](
            *given[:2], own, own if scale is None else scale, own if bias is None else bias, *pair, given[2], m, n, k,
            rank, 0 if scale is None or scale.numel() == 1 else 1, scale is not None, bias is not None,
            hidden is not None, max(FEWEST, min(most, triton.next_power_of_2(max(rank, 1)))), x.dtype == torch.int8,
            tiles, tiles or k % sides[2] == 0, BAND=BAND, **size)
    return out
