"""Writes a LoRA at another rank: the nearest change of weight that has it, and what is lost by that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.export import lowrank, texts, writer
from trainer.export.layers import check_out, open_whole, own_format, pairs_of, rows, source, stacks
from trainer.export.lora_file import LoraFile
from trainer.export.lowrank import Svd
from trainer.export.stacked import Pair
from trainer.export.writer import Written

Tell = Callable[[int, int], None]  # layers done, of all


@dataclass(frozen=True)
class Cut:
    """A layer's rank before and after, ‖ΔW‖_F² before, and how much of that is gone."""

    layer: str
    before: int
    after: int
    energy: float
    lost: float

    @property
    def kept(self) -> float:
        """Share of the energy that is left, 0 to 1."""
        return 1 - self.lost / self.energy if self.energy else 1.0


@dataclass(frozen=True)
class Resized:
    """The file written, and each layer's loss."""

    written: Written
    cuts: list[Cut]

    @property
    def kept(self) -> float:
        """Share of ‖ΔW‖_F² of all layers that is left."""
        energy = sum(cut.energy for cut in self.cuts)
        return 1 - sum(cut.lost for cut in self.cuts) / energy if energy else 1.0


def resize(path: Path, out: Path, *, rank: int | None = None, energy: float | None = None,
           dynamic: float | None = None, dtype: str = "auto", keep_paths: bool = False,
           tell: Tell = lambda done, of: None) -> Resized:
    """Write `path` as `out` at another rank; exactly one of the three says which.

    rank: every layer's largest. energy: the smallest rank for all layers that keeps this share (0 to 1) of the whole
    file's ‖ΔW‖_F². dynamic: each layer's own smallest rank that keeps this share of its own. Layers that have no more
    stay as they are; others become the nearest matrix of that rank, in fp64, cast last. DoRA magnitudes stay.
    keep_paths: the metadata keep the folders of paths. Raises UserError for a file that cannot be read whole, and for
    impossible numbers.
    """
    _check(rank, energy, dynamic)
    check_out(out, path)
    lora = open_whole(path)
    if energy is not None:
        rank = _common_rank(lora, energy)
    cuts: list[Cut] = []
    pairs: list[Pair] = []
    layers = rows(lora)
    for done, (layer, keys) in enumerate(layers.items(), 1):
        for pair, cut in resized_layer(layer, pairs_of(lora, keys), rank, dynamic):
            pairs.append(pair)
            cuts += [cut] if cut else []
        tell(done, len(layers))
    form, alpha = own_format(lora), None
    if dynamic is not None and form in ("U1", "U2"):  # one alpha for all, and so another scale for each rank
        alpha = float(max(len(down) for _, _, down, _ in pairs))
        pairs = [(name, up * (len(down) / alpha), down, magnitude) for name, up, down, magnitude in pairs]
    step = {"rank": rank} if energy is None and rank else {"energy": energy} if energy else {"dynamic": dynamic}
    words = texts.with_step(texts.kept(lora.metadata, paths=keep_paths), "resize", **step, **{"from": [source(lora)]})
    written = writer.write(out, pairs, family=lora.family, dtype=lora.dtype if dtype == "auto" else dtype,
                           metadata=words, form=form, alpha=alpha, even=dynamic is None)
    return Resized(written, cuts)


def _check(rank: int | None, energy: float | None, dynamic: float | None) -> None:
    if sum(choice is not None for choice in (rank, energy, dynamic)) != 1:
        raise UserError("resize needs one of --rank, --energy and --dynamic")
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: give a whole number from 1 on")
    for name, share in (("energy", energy), ("dynamic", dynamic)):
        if share is not None and not 0 < share <= 1:
            raise UserError(f"--{name} {share:g}: give a share between 0 and 1, such as 0.98")


def _common_rank(lora: LoraFile, share: float) -> int:
    """The smallest rank for all layers that keeps this share of the file's energy."""
    spectra = [_svd(stack).s.square() for keys in rows(lora).values() for stack in stacks(pairs_of(lora, keys))]
    longest = max(len(spectrum) for spectrum in spectra)
    total = sum(torch.nn.functional.pad(spectrum, (0, longest - len(spectrum))) for spectrum in spectra)
    return lowrank.rank_for(total.sqrt(), share, float(total.sum()))


def resized_layer(layer: str, pairs: list[Pair], rank: int | None,
                  share: float | None = None) -> Iterator[tuple[Pair, Cut | None]]:
    """A layer's modules at their new rank; beside the first of each matrix what is lost of it.

    rank: the largest; None: what `share` needs. Parts that a file may keep as one matrix get one rank, since programs
    take them apart by equal columns.
    """
    groups = stacks(pairs)
    found = [_svd(stack) for stack in groups]
    if rank is None:
        rank = max(lowrank.rank_for(svd.s, share, svd.energy) for svd in found)
    for stack, svd in zip(groups, found):
        before = len(stack[0][2])
        name = layer if len(stack) > 1 else stack[0][0]
        cuts = [Cut(name, before, min(before, rank), svd.energy, svd.lost(rank)), *[None] * (len(stack) - 1)]
        if before <= rank and (share is None or len(groups) == 1):
            yield from zip(stack, cuts)
            continue
        up, down = svd.factors(rank)
        pieces = up.split([len(pair[1]) for pair in stack])
        for (module, _, kernel, magnitude), piece, cut in zip(stack, pieces, cuts):
            yield (module, *lowrank.as_layer(piece, down, kernel.shape[1:]), magnitude), cut


def _svd(stack: list[Pair]) -> Svd:
    """Of the rows of all pairs of a stack, which share their down."""
    up = torch.cat([lowrank.matrices(up, down)[0] for _, up, down, _ in stack])
    return lowrank.of_factors(up, lowrank.matrices(*stack[0][1:3])[1])

