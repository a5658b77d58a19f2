"""Adapters over stacked rows (q, k, v and mlp of one input) as the separate modules that a file names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

Pair = tuple[str, Tensor, Tensor, Tensor | None]  # name, up, down, magnitude

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
