"""Compares two LoRAs: whether they change the same layers, in the same directions, and what they make together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.export import lowrank
from trainer.export.layers import pairs_of
from trainer.export.lowrank import Svd
from trainer.export.merge import Weighted, all_rows, open_weighted
from trainer.export.resize import Tell
from trainer.export.stacked import Pair

ANGLES = 8  # cosines that are kept of each layer
NEAR, TOUCHING = 0.5, 0.1  # shares of one file's change in the other's directions, and cosines, for the words


@dataclass(frozen=True)
class Overlap:
    """A layer that both change; norms with the weights counted in.

    into, out_of: mean squared cosine of the principal angles between the spaces that the two read from the layer's
    input, and write to its output: 0 apart, 1 the smaller lies in the larger; chance is what random spaces have.
    shared: the share of the first one's change that lies in the second's spaces on both sides. cosine: of the two
    changes as vectors: 1 alike, 0 at right angles, -1 opposite.
    """

    layer: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    into: float
    out_of: float
    chance: float  # of the two means, averaged
    angles: tuple[list[float], list[float]]  # the largest cosines: input, output
    shared: float
    cosine: float

    @property
    def together(self) -> float:
        """Norm of the sum."""
        a, b = self.norms
        return math.sqrt(max(0.0, a * a + b * b + 2 * self.cosine * a * b))


@dataclass(frozen=True)
class Comparison:
    """Two files: layers of both, names of those of one alone, and norms of all they change."""

    names: tuple[str, str]
    weights: tuple[float, float]
    layers: list[Overlap]
    alone: tuple[list[str], list[str]]
    norms: tuple[float, float]
    together: float
    has_magnitudes: bool  # DoRA's, which are not compared

    @property
    def cosine(self) -> float:
        """Of the two changes of the whole model."""
        a, b = self.norms
        return (self.together**2 - a * a - b * b) / (2 * a * b) if a and b else 0.0

    def mean(self, field: str) -> float:
        """A field of the layers, weighted by how much both change each."""
        sizes = [layer.norms[0] * layer.norms[1] for layer in self.layers]
        total = sum(sizes)
        return sum(size * getattr(layer, field) for size, layer in zip(sizes, self.layers)) / total if total else 0.0


def compare(paths: Sequence[Path], weights: Sequence[float] = (), *,
            tell: Tell = lambda done, of: None) -> Comparison:
    """Compare two LoRAs of one family, of any formats, from r x r matrices. Raises UserError for files of several
    families or sizes, and for two that change nothing."""
    if len(paths) != 2:
        raise UserError("compare takes two files")
    files = open_weighted(paths, weights)
    layers: list[Overlap] = []
    alone: tuple[list[str], list[str]] = ([], [])
    squares = [0.0, 0.0, 0.0]
    found = all_rows(files)
    for done, keys in enumerate(found.values(), 1):
        first, second = ({pair[0]: pair for pair in pairs_of(file.lora, own)} for file, own in zip(files, keys))
        for module in dict.fromkeys([*first, *second]):
            pairs = first.get(module), second.get(module)
            sums = [_energy(pair) * file.weight**2 if pair else 0.0 for pair, file in zip(pairs, files)]
            squares = [squares[0] + sums[0], squares[1] + sums[1], squares[2] + sum(sums)]
            if all(sums):
                layers.append(overlap(*pairs, files[0].weight, files[1].weight))
                squares[2] += layers[-1].together ** 2 - sum(sums)
            elif any(sums):
                alone[0 if sums[0] else 1].append(module)
        tell(done, len(found))
    if not any(squares):
        raise UserError("neither of the two files changes anything: all their layers are zero")
    names = tuple(file.lora.path.name for file in files)
    return Comparison(names, (files[0].weight, files[1].weight), layers, alone,
                      (math.sqrt(squares[0]), math.sqrt(squares[1])), math.sqrt(max(0.0, squares[2])),
                      any(_has_magnitudes(file) for file in files))


def _has_magnitudes(file: Weighted) -> bool:
    return any("dora" in entry.parts for entry in file.lora.entries.values())


def _energy(pair: Pair) -> float:
    return _svd(pair).energy


def _svd(pair: Pair) -> Svd:
    return lowrank.of_factors(*lowrank.matrices(pair[1], pair[2]))


def overlap(first: Pair, second: Pair, weight: float = 1.0, other: float = 1.0) -> Overlap:
    """Two changes of one layer. Raises UserError when they are of other sizes."""
    a, b = _svd(first), _svd(second)
    if (len(a.u), a.vt.shape[1]) != (len(b.u), b.vt.shape[1]):
        raise UserError(f"{first[0]} is {len(a.u)} x {a.vt.shape[1]} in one file and {len(b.u)} x {b.vt.shape[1]} in "
                        "the other: they are for different base models")
    p, q = a.rank, b.rank
    into, out_of = a.vt[:p] @ b.vt[:q].T, a.u[:, :p].T @ b.u[:, :q]  # p q: cosines between the bases
    inner = float(((a.s[:p, None] * into) * out_of * b.s[:q]).sum())
    sizes = math.sqrt(a.energy), math.sqrt(b.energy)
    inside = float((out_of.T @ (a.s[:p, None] * into)).square().sum()) / a.energy
    angles = tuple([float(cosine.clamp(max=1.0)) for cosine in torch.linalg.svdvals(part)[:ANGLES]]
                   for part in (into, out_of))
    few, most = min(p, q), max(p, q)
    sign = math.copysign(1.0, weight * other)
    return Overlap(first[0], (p, q), (abs(weight) * sizes[0], abs(other) * sizes[1]),
                   float(into.square().sum()) / few, float(out_of.square().sum()) / few,
                   (min(1.0, most / a.vt.shape[1]) + min(1.0, most / len(a.u))) / 2, angles, min(1.0, inside),
                   sign * inner / (sizes[0] * sizes[1]))


def as_words(comparison: Comparison) -> list[str]:
    """What the numbers mean, in sentences."""
    a, b = comparison.names
    common, chance, cosine = len(comparison.layers), comparison.mean("chance"), comparison.cosine
    lines = [f"{common} layers are changed by both; {len(comparison.alone[0])} by {a} alone, "
             f"{len(comparison.alone[1])} by {b} alone."]
    if common:
        shared = comparison.mean("shared")
        lines.append(f"In those, {shared:.0%} of what {a} changes lies in directions that {b} uses too (mean overlap "
                     f"{(comparison.mean('into') + comparison.mean('out_of')) / 2:.1%}; of random directions "
                     f"{chance:.1%}).")
    if cosine > NEAR:
        effect = "They want much the same: together it may be too strong, so lower both weights."
    elif cosine < -TOUCHING:
        effect = "They work against each other: together, each loses a part of its effect."
    elif common and comparison.mean("shared") > NEAR:
        effect = "They change the same directions in different ways: expect them to disturb each other."
    elif cosine > TOUCHING:
        effect = "They agree in part: together it is somewhat stronger than either."
    else:
        effect = "They hardly touch each other: both should keep their effect together."
    larger = max(comparison.norms)
    lines.append(f"{effect} The sum changes the model {comparison.together / larger:.2f} times as much as the stronger "
                 "one alone.")
    if comparison.has_magnitudes:
        lines.append("DoRA magnitudes are not compared: what they do depends on the base model.")
    return lines


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison for programs."""
    means = {name: comparison.mean(name) for name in ("into", "out_of", "chance", "shared")}
    return asdict(comparison) | {"cosine": comparison.cosine, "words": as_words(comparison), "mean": means}
