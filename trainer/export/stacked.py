"""Adapters over stacked rows (q, k, v and mlp of one input) as the separate modules that a file names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Pair = tuple[str, Tensor, Tensor, Tensor | None]  # name, up, down, magnitude
Module = tuple[Tensor, Tensor, Tensor | None]

_PARTS = {
    ".attn.to_qkv": (".attn.to_q", ".attn.to_k", ".attn.to_v"),
    ".attn.add_qkv_proj": (".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj"),
    ".attn.to_qkv_mlp": (".attn.to_q", ".attn.to_k", ".attn.to_v", ".proj_mlp"),
}


def apart(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Each stacked pair as one a module: the same `down`, and its rows of `up`; others as they are.

    ΔW of a part is its rows of the stacked ΔW, so the rank stays r. q, k and v have as many rows as inputs.
    """
    for name, up, down, magnitude in pairs:
        ending = next((ending for ending in _PARTS if name.endswith(ending)), None)
        if ending is None:
            yield name, up, down, magnitude
            continue
        parts, width = _PARTS[ending], down.shape[1]
        rows = [width] * 3 + ([up.shape[0] - 3 * width] if len(parts) == 4 else [])
        for part, piece in zip(parts, up.split(rows)):
            yield name.removesuffix(ending) + part, piece, down, magnitude


def together(pairs: Mapping[str, Module], targets: Mapping[str, Sequence[int]]) -> dict[str, Module]:
    """A file's pairs by module as an adapter over stacked rows wants them, ΔW unchanged.

    targets: name of each adapted layer -> rows of its parts. Parts that share `down`, as `apart` writes them, keep
    their rank; others are put side by side, at the sum of their ranks.
    """
    found = dict(pairs)
    for name, rows in targets.items():
        ending = next((ending for ending in _PARTS if name.endswith(ending)), None)
        if ending is None:
            continue
        parts = [found.pop(name.removesuffix(ending) + part, None) for part in _PARTS[ending]]
        if any(parts):
            found[name] = fuse(parts, rows)
    return found


def fuse(parts: Sequence[Module | None], rows: Sequence[int], even: bool = False) -> Module:
    """Modules of one input as the one over their stacked rows: up [sum(rows), R], down [R, n].

    Parts that share `down` keep their rank; others are put side by side, `up` block by block, R being the sum of
    their ranks. even: then a missing part (None) gets a block of zeros too, so that R is parts x rank, by which
    diffusers (and `unfuse`) know how to take them apart. There is no magnitude: DoRA's norms are of whole columns.
    """
    there = [part for part in parts if part is not None]
    first = there[0][1]
    if all(down.shape == first.shape and torch.equal(down, first) for _, down, _ in there):
        ups = [part[0] if part is not None else first.new_zeros(count, len(first)) for part, count in zip(parts, rows)]
        return torch.cat(ups), first, None
    if even:
        parts = [part or (first.new_zeros(count, len(first)), torch.zeros_like(first), None)
                 for part, count in zip(parts, rows)]
        there = list(parts)
    up = first.new_zeros(sum(rows), sum(len(down) for _, down, _ in there))
    row, column = 0, 0
    for part, count in zip(parts, rows):
        if part is not None:
            up[row : row + count, column : column + len(part[1])] = part[0]
            column += len(part[1])
        row += count
    return up, torch.cat([down for _, down, _ in there]), None


def unfuse(up: Tensor, down: Tensor, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """(up, down) of each part of stacked rows: at its own rank where `up` is in blocks, else all with the same `down`.
    """
    ups, rank = up.split(list(rows)), block_rank(up, rows)
    if rank is None:
        return [(piece, down) for piece in ups]
    spans = [slice(i * rank, (i + 1) * rank) for i in range(len(ups))]
    return [(piece[:, span], down[span]) for piece, span in zip(ups, spans)]


def block_rank(up: Tensor, rows: Sequence[int]) -> int | None:
    """Columns of each part, where stacked rows are those of parts put side by side (and perhaps padded); else None."""
    count, columns = len(rows), up.shape[1]
    live = [piece.ne(0).any(0).nonzero().flatten().tolist() for piece in up.split(list(rows))]
    if not any(live):
        return None

    def fits(rank: int) -> bool:
        return all(not own or i * rank <= own[0] and own[-1] < (i + 1) * rank for i, own in enumerate(live))

    even = [columns // count] if columns % count == 0 else []
    return next(filter(fits, [*even, *range(1, columns // count + 1)]), None)


def part_heights(modules: Sequence[str], total: int, width: int) -> list[int]:
    """Rows of each part of a key over several modules: q, k and v have as many as inputs, an mlp has the rest."""
    if len(modules) == 4:
        return [width] * 3 + [total - 3 * width]
    return [total // len(modules)] * len(modules)
