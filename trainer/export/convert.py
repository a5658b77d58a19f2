"""Writes a LoRA file anew in another of its family's formats, with the same change of every layer."""

from __future__ import annotations

import math
from pathlib import Path

from trainer.export import formats, writer
from trainer.export.layers import check_out, open_whole
from trainer.export.lora_file import LoraFile
from trainer.export.stacked import Pair
from trainer.export.texts import Labels, kept, labelled
from trainer.export.writer import Written

UNCHANGED = Labels()


def convert(path: Path, to: str, out: Path, *, dtype: str = "auto", labels: Labels = UNCHANGED,
            keep_paths: bool = False) -> Written:
    """Write `path` as `out` in the format `to` (such as "F5"); dtype "auto" keeps the file's own precision.

    The change of every layer stays the same to the bit, unless alpha is folded in that is no power of two times the
    rank. Metadata are kept but for names and hashes, and, unless
    `keep_paths`, the folders of paths. Raises UserError for a file that cannot be read or has layers
    that are not known, and for a format that the family has not or that cannot hold the file.
    """
    lora = open_whole(path)
    form = formats.find(lora.family, to)
    check_out(out, path)
    alpha = _common_alpha(lora) if form.ending == lora.format.ending == "kohya" else None
    pairs = list(lora.pairs(fold=alpha is None))
    if lora.format.style == "native":  # fused q, k and v had their ranks side by side, and the others zeros
        pairs = trimmed(pairs)
    texts = labelled(kept(lora.metadata, paths=keep_paths), labels)
    precision = lora.dtype if dtype == "auto" else dtype
    return writer.write(out, pairs, family=lora.family, dtype=precision, metadata=texts, form=form.name, alpha=alpha)


def _common_alpha(lora: LoraFile) -> float | None:
    """The file's one alpha, if it has one and one rank; None: it must be folded in, where NaN is found."""
    values = set(lora.alphas.values())
    if len(values) != 1 or len(lora.alphas) != len(lora.entries) or len(lora.ranks) != 1 or (
            not all(map(math.isfinite, values))):
        return None
    if any(len(entry.place.modules) > 1 for entry in lora.entries.values()):
        return None
    return values.pop()


def trimmed(pairs: list[Pair]) -> list[Pair]:
    """Without the last columns of `up` (rows of `down`) that are zero in every module: what padding has added."""
    rank = max([1, *(_used(pair) for pair in pairs)])
    return [(name, up[:, :rank], down[:rank], magnitude) for name, up, down, magnitude in pairs]


def _used(pair: Pair) -> int:
    _, up, down, _ = pair
    live = (up.flatten(2).sum(2) if up.ndim == 4 else up).ne(0).any(0) & down.flatten(1).ne(0).any(1)
    return int(live.nonzero().amax()) + 1 if live.any() else 0
