"""Merges LoRAs into one: exactly, their factors side by side, or as the nearest change of a lower rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.export import header, texts, writer
from trainer.export.formats import FAMILIES
from trainer.export.layers import check_out, open_whole, own_format, pairs_of, rows, source
from trainer.export.lora_file import LoraFile
from trainer.export.resize import Cut, Resized, Tell, resized_layer
from trainer.export.stacked import Pair


@dataclass(frozen=True)
class Weighted:
    """A LoRA and how strongly it counts; a negative weight takes it away."""

    lora: LoraFile
    weight: float


def merge(paths: Sequence[Path], weights: Sequence[float], out: Path, *, rank: int | None = None, dtype: str = "auto",
          keep_paths: bool = False, tell: Tell = lambda done, of: None) -> Resized:
    """Write the weighted sum of several LoRAs of one family as `out`, in the first one's format.

    rank None: exactly, at the sum of their ranks (factors side by side). Else each layer's nearest matrix of at most
    that rank, with what is lost. dtype "auto": the widest of theirs. keep_paths: the
    metadata keep the folders of paths. Raises UserError for files of several families,
    for DoRA (whose change depends on the base), and for a rank that no program would read.
    """
    files = open_weighted(paths, weights)
    check_out(out, *paths)
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: give a whole number from 1 on")
    first = files[0].lora
    for file in files:
        _refuse_dora(file.lora)
    if rank is None and sum(max(file.lora.ranks) for file in files) > header.MOST_RANK:
        raise UserError(f"the merged file would have a rank beyond {header.MOST_RANK}: choose a smaller one by --rank")
    pairs: list[Pair] = []
    cuts: list[Cut] = []
    layers = all_rows(files)
    for done, (layer, keys) in enumerate(layers.items(), 1):
        side_by_side = list(_sum(files, keys))
        if rank is None:
            pairs += side_by_side
        else:
            for pair, cut in resized_layer(layer, side_by_side, rank):
                pairs.append(pair)
                cuts += [cut] if cut else []
        tell(done, len(layers))
    widest = max((file.lora.dtype for file in files), key=("fp16", "bf16", "fp32").index)
    mixed = {file.lora.dtype for file in files} == {"fp16", "bf16"}  # neither holds the other
    precision = dtype if dtype != "auto" else "fp32" if mixed else widest
    written = writer.write(out, pairs, family=first.family, dtype=precision, metadata=_texts(files, rank, keep_paths),
                           form=own_format(first))
    return Resized(written, cuts)


def open_weighted(paths: Sequence[Path], weights: Sequence[float]) -> list[Weighted]:
    """LoRAs of one family with their weights (none given: 1 each). Raises UserError for what cannot go together."""
    weights = list(weights) or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise UserError(f"{len(paths)} files and {len(weights)} weights: give as many weights as files, in their order")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError("--weights must be numbers, such as 0.8")
    files = [Weighted(open_whole(path), weight) for path, weight in zip(paths, weights)]
    for file in files[1:]:
        if file.lora.family != files[0].lora.family:
            raise UserError(f"{file.lora.path} is for {FAMILIES[file.lora.family]} and {files[0].lora.path} for "
                            f"{FAMILIES[files[0].lora.family]}: only LoRAs of one family can go together")
    return files


def all_rows(files: Sequence[Weighted]) -> dict[str, list[list[str]]]:
    """Every layer that any of the files changes, and each file's keys of it."""
    found = [rows(file.lora) for file in files]
    layers = dict.fromkeys(layer for own in found for layer in own)
    return {layer: [own.get(layer, []) for own in found] for layer in layers}


def _sum(files: Sequence[Weighted], keys: Sequence[list[str]]) -> Iterator[Pair]:
    """One layer's modules: factors of all files side by side, the weights in `up`."""
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor, str]]] = {}
    for file, own in zip(files, keys):
        for name, up, down, _ in pairs_of(file.lora, own):
            parts.setdefault(name, []).append((up if file.weight == 1.0 else file.weight * up, down, file.lora.path))
    for name, found in parts.items():
        shapes = {(len(up), *down.shape[1:]) for up, down, _ in found}
        if len(shapes) > 1:
            sizes = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
            raise UserError(f"{found[-1][2]}: {name} has another size than in the first file ({sizes}): they are for "
                            "different base models")
        yield name, torch.cat([up for up, _, _ in found], 1), torch.cat([down for _, down, _ in found]), None


def _refuse_dora(lora: LoraFile) -> None:
    if any({"dora", "vector"} & entry.parts.keys() for entry in lora.entries.values()):
        raise UserError(f"{lora.path} is a DoRA: what it changes depends on the base model, so it cannot be added to "
                        "another LoRA. Put it into its base with `bake`, and `extract` a LoRA from that")


def _texts(files: Sequence[Weighted], rank: int | None, keep_paths: bool) -> texts.Texts:
    """What the files say alike, and what was merged with which weight."""
    said = [texts.kept(file.lora.metadata, paths=keep_paths) for file in files]
    found = texts.joined(said)
    names = [own.get("modelspec.title") or file.lora.path.stem for own, file in zip(said, files)]
    steps = {"rank": rank} if rank else {}
    sources = [source(file.lora, file.weight) for file in files]
    return texts.with_step(found, "merge", **steps, **{"from": sources}) | {"modelspec.merged_from": ", ".join(names)}
