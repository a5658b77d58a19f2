"""Reads a LoRA file through: every layer's norm and rank, and which programs apply all of it as it is meant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from trainer.adapters.effective_rank import entropy_rank, singular_values, stable_rank
from trainer.export.consumers import CONSUMERS, READERS, Fault, Reading, read_as
from trainer.export.lora_file import Entry, LoraFile
from trainer.export.sizes import Sizes
from trainer.export.stacked import block_rank


@dataclass(frozen=True)
class Layer:
    """One key of a file: the norm of its change ‖ΔW‖_F, and how much of its rank that uses."""

    key: str
    modules: tuple[str, ...]
    weight: tuple[int, ...]  # shape of what it changes
    rank: int
    alpha: float | None
    dora: bool  # whether it has a magnitude, which changes the base even where up and down do not
    norm: float  # alpha / rank counted in; NaN where numbers are not finite
    erank: float
    stable: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return self.norm == 0.0 and not self.dora


@dataclass(frozen=True)
class Misfit:
    """A key whose layer has another shape in the model, or (expected None) that the model has not."""

    key: str
    found: tuple[int, ...]
    expected: tuple[int, ...] | None


def readers(lora: LoraFile, trained: Sizes) -> tuple[list[str], list[str]]:
    """Names of the programs that apply a whole file as it is meant, and what the family's others do instead.

    trained: shapes of the layers that were trained; what the file has beside them is there for its format alone.
    """
    layers, blocks = measure(lora)
    wrong = [misfit for misfit in misfits(lora, trained) if misfit.expected is not None]
    readings = [read_whole(consumer, lora, layers, blocks, wrong) for consumer in READERS[lora.family]]
    return ([CONSUMERS[reading.consumer] for reading in readings if reading.whole],
            [f"{CONSUMERS[reading.consumer]} {fault.text}" for reading in readings for fault in reading.faults])


def read_whole(consumer: str, lora: LoraFile, layers: Sequence[Layer], blocks: set[str],
               wrong: Sequence[Misfit]) -> Reading:
    """What a consumer makes of a file, with what no consumer can mend: shapes and numbers that are wrong."""
    reading = read_as(consumer, lora, blocks)
    for fault in _common_faults(layers, wrong):
        reading.faults.append(fault)
        reading.strengths |= dict.fromkeys(fault.keys, fault.strength) if fault.strength is not None else {}
    return reading


def _common_faults(layers: Sequence[Layer], wrong: Sequence[Misfit]) -> Iterator[Fault]:
    """What is wrong with a file for every consumer."""
    if wrong:
        yield Fault("cannot apply layers of other shapes than the model's, or that the model has not",
                    tuple(misfit.key for misfit in wrong))
    broken = tuple(layer.key for layer in layers if not layer.finite)
    if broken:
        yield Fault("draws black or broken pictures: there are numbers that are not finite", broken, math.nan)
    if layers and all(layer.idle for layer in layers):
        yield Fault("applies it without any effect: all layers are zero", tuple(layer.key for layer in layers), None)


def misfits(lora: LoraFile, sizes: Sizes) -> list[Misfit]:
    """Keys of a file whose layers have another shape in a model, or that it has not."""
    found = []
    for key, entry in lora.entries.items():
        shapes = [sizes.get(module) for module in entry.place.modules]
        expected = None if None in shapes else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if expected is None or _flat(expected) != _flat(entry.weight):
            found.append(Misfit(key, entry.weight, expected))
    return found


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the kernel of a 1 x 1 convolution, which is a linear layer."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def measure(lora: LoraFile) -> tuple[list[Layer], set[str]]:
    """Every key's norm and rank from r x r matrices, and those whose fused rows are in blocks."""
    layers, blocks = [], set()
    for entry, (up, down, magnitude) in lora.modules():
        layers.append(_layer(entry, up, down, magnitude, lora.alphas.get(entry.key)))
        if len(entry.rows) > 1 and block_rank(up, entry.rows) == entry.rank / len(entry.rows):
            blocks.add(entry.key)
    return layers, blocks


def _layer(entry: Entry, up: Tensor, down: Tensor, magnitude: Tensor | None, alpha: float | None) -> Layer:
    up, down = up.double().flatten(1), down.double().flatten(1)
    about = entry.key, entry.place.modules, entry.weight, entry.rank, alpha, magnitude is not None
    if not all(part is None or part.isfinite().all() for part in (up, down, magnitude)):
        return Layer(*about, math.nan, math.nan, math.nan)
    if not (up.any() and down.any()):
        return Layer(*about, 0.0, 0.0, 0.0)
    sizes = float(up.abs().amax()), float(down.abs().amax())  # squares of tiny numbers would vanish
    grams = [(factor.T @ factor)[None] for factor in (up / sizes[0], down.T / sizes[1])]
    values = singular_values(*grams)
    return Layer(*about, float(values.norm()) * sizes[0] * sizes[1], float(entropy_rank(values)),
                 float(stable_rank(values)))
