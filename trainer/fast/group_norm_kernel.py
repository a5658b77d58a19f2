"""Group norm of channels-last activations as a GPU's kernels, in Triton: they read and write whole lines of channels.

Both passes take three steps: sums for each channel over a piece of the image, those of a group from its channels' and
pieces', and the result. Sums run in one order, so that a pass repeats itself to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS, WARPS = 64, 64, 4  # pixels and channels of a program; UNets' channels are multiples of that
PIECES = 32  # whose sums are added at a time


@triton.jit
def _tile(channels, pixels, per_group, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a program's pixels and channels lie, which of them there are, and the groups of its channels."""
    image, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    spot = (image * pixels + row[:, None]) * channels + channel[None, :]
    inside = (row[:, None] < pixels) & (channel[None, :] < channels)
    return spot, inside, channel, image * (channels // per_group) + channel // per_group


@triton.jit
def _moments(x, sums, channels, pixels, per_group, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    spot, inside, channel, group = _tile(channels, pixels, per_group, ROWS, CHANNELS)
    y = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32)
    here = tl.minimum(pixels - tl.program_id(1) * ROWS, ROWS)
    mean = tl.sum(y, 0) / here
    off = tl.where(inside, y - mean[None, :], 0.0)
    place = sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + channel
    tl.store(place, mean, mask=channel < channels)
    tl.store(place + channels, tl.sum(off * off, 0), mask=channel < channels)


@triton.jit
def _group_moments(sums, mean_out, scale_out, channels, pixels, per_group, pieces, eps, ROWS: tl.constexpr,
                   PIECES: tl.constexpr, WIDE: tl.constexpr):
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    piece, channel = tl.arange(0, PIECES), tl.arange(0, WIDE)
    at = sums + image * pieces * 2 * channels + group * per_group + channel[None, :]
    total, square = tl.zeros((PIECES, WIDE), tl.float32), tl.zeros((PIECES, WIDE), tl.float32)
    for first in range(0, pieces, PIECES):
        there = first + piece
        inside = (there[:, None] < pieces) & (channel[None, :] < per_group)
        count = tl.minimum(pixels - there * ROWS, ROWS)[:, None]
        total += tl.load(at + there[:, None] * 2 * channels, mask=inside, other=0.0) * count
    mean = tl.sum(total) / (pixels * per_group)
    for first in range(0, pieces, PIECES):
        there = first + piece
        inside = (there[:, None] < pieces) & (channel[None, :] < per_group)
        count = tl.minimum(pixels - there * ROWS, ROWS)[:, None]
        off = tl.where(inside, tl.load(at + there[:, None] * 2 * channels, mask=inside, other=0.0) - mean, 0.0)
        square += tl.load(at + (there[:, None] * 2 + 1) * channels, mask=inside, other=0.0) + off * off * count
    spot = image * tl.num_programs(1) + group
    tl.store(mean_out + spot, mean)
    tl.store(scale_out + spot, 1 / tl.sqrt(tl.sum(square) / (pixels * per_group) + eps))


@triton.jit
def _normalise(x, weight, bias, mean, scale, out, channels, pixels, per_group, ROWS: tl.constexpr,
               CHANNELS: tl.constexpr):
    spot, inside, channel, group = _tile(channels, pixels, per_group, ROWS, CHANNELS)
    there = channel < channels
    gain = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32) * tl.load(scale + group, mask=there, other=0)
    shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    y = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + group, mask=there, other=0.0)[None, :]
    tl.store(out + spot, (y * gain[None, :] + shift[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums(grad, x, mean, scale, sums, channels, pixels, per_group, ROWS: tl.constexpr,
                   CHANNELS: tl.constexpr):
    spot, inside, channel, group = _tile(channels, pixels, per_group, ROWS, CHANNELS)
    there = channel < channels
    g = tl.load(grad + spot, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + group, mask=there, other=0.0)[None, :]
    y *= tl.load(scale + group, mask=there, other=0.0)[None, :]
    place = sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + channel
    tl.store(place, tl.sum(g, 0), mask=there)
    tl.store(place + channels, tl.sum(g * y, 0), mask=there)


@triton.jit
def _group_gradients(sums, weight, of_mean, of_scale, channels, pixels, per_group, pieces, PIECES: tl.constexpr,
                     WIDE: tl.constexpr):
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    piece, channel = tl.arange(0, PIECES), tl.arange(0, WIDE)
    at = sums + image * pieces * 2 * channels + group * per_group + channel[None, :]
    plain, along = tl.zeros((PIECES, WIDE), tl.float32), tl.zeros((PIECES, WIDE), tl.float32)
    for first in range(0, pieces, PIECES):
        there = first + piece
        inside = (there[:, None] < pieces) & (channel[None, :] < per_group)
        plain += tl.load(at + there[:, None] * 2 * channels, mask=inside, other=0.0)
        along += tl.load(at + (there[:, None] * 2 + 1) * channels, mask=inside, other=0.0)
    gain = tl.load(weight + group * per_group + channel, mask=channel < per_group, other=0.0).to(tl.float32)[None, :]
    spot = image * tl.num_programs(1) + group
    tl.store(of_mean + spot, tl.sum(plain * gain) / (pixels * per_group))
    tl.store(of_scale + spot, tl.sum(along * gain) / (pixels * per_group))


@triton.jit
def _input_gradient(grad, x, weight, mean, scale, of_mean, of_scale, out, channels, pixels, per_group,
                    ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    spot, inside, channel, group = _tile(channels, pixels, per_group, ROWS, CHANNELS)
    there = channel < channels
    size = tl.load(scale + group, mask=there, other=0.0)[None, :]
    g = tl.load(grad + spot, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)[None, :]
    y = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + group, mask=there, other=0.0)[None, :]
    g -= tl.load(of_mean + group, mask=there, other=0.0)[None, :]
    g -= y * size * tl.load(of_scale + group, mask=there, other=0.0)[None, :]
    tl.store(out + spot, (g * size).to(out.dtype.element_ty), mask=inside)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normed x [n, c, h, w], whose channels come last, and each group's mean and 1 / deviation [n, groups]."""
    grid, shape, wide = _work(x, groups)
    sums = x.new_empty(grid[0], grid[1], 2, x.shape[1], dtype=torch.float32)
    mean, scale = x.new_empty(2, len(x), groups, dtype=torch.float32)
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        _moments[grid](x, sums, *shape, ROWS, CHANNELS, num_warps=WARPS)
        _group_moments[(len(x), groups)](sums, mean, scale, *shape, grid[1], eps, ROWS, PIECES, wide, num_warps=WARPS)
        _normalise[grid](x, weight, bias, mean, scale, out, *shape, ROWS, CHANNELS, num_warps=WARPS)
    return out, mean, scale


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x from that of what `normalise` gave; both have their channels last."""
    groups = mean.shape[1]
    grid, shape, wide = _work(x, groups)
    sums = x.new_empty(grid[0], grid[1], 2, x.shape[1], dtype=torch.float32)
    of_mean, of_scale = torch.empty_like(mean), torch.empty_like(scale)
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        _gradient_sums[grid](grad, x, mean, scale, sums, *shape, ROWS, CHANNELS, num_warps=WARPS)
        _group_gradients[(len(x), groups)](sums, weight, of_mean, of_scale, *shape, grid[1], PIECES, wide,
                                           num_warps=WARPS)
        _input_gradient[grid](grad, x, weight, mean, scale, of_mean, of_scale, out, *shape, ROWS, CHANNELS,
                              num_warps=WARPS)
    return out


def _work(x: Tensor, groups: int) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
    """How many programs there are, the sizes that they take, and columns that hold a group's channels."""
    count, channels, pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
    return ((count, triton.cdiv(pixels, ROWS), triton.cdiv(channels, CHANNELS)),
            (channels, pixels, channels // groups), triton.next_power_of_2(channels // groups))
