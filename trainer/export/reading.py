"""Reads a LoRA file through: every layer's norm and rank, and which programs apply all of it as it is meant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from trainer.adapters.effective_rank import entropy_rank, singular_values, stable_rank
from trainer.export.consumers import CONSUMERS, READERS, read_as
from trainer.export.lora_file import Entry, LoraFile
from trainer.export.stacked import block_rank


@dataclass(frozen=True)
class Layer:
    """One key of a file: the norm of its change ‖ΔW‖_F, and how much of its rank that uses."""

    key: str
    modules: tuple[str, ...]
    weight: tuple[int, ...]  # shape of what it changes
    rank: int
    alpha: float | None
    norm: float  # alpha / rank counted in; NaN where numbers are not finite
    erank: float
    stable: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


def readers(lora: LoraFile) -> tuple[list[str], list[str]]:
    """Names of the programs that apply a whole file as it is meant, and what the family's others do instead."""
    _, blocks = measure(lora)
    readings = [read_as(consumer, lora, blocks) for consumer in READERS[lora.family]]
    return ([CONSUMERS[reading.consumer] for reading in readings if reading.whole],
            [f"{CONSUMERS[reading.consumer]} {fault.text}" for reading in readings for fault in reading.faults])


def measure(lora: LoraFile) -> tuple[list[Layer], set[str]]:
    """Every key's norm and rank from r x r matrices, and those whose fused rows are in blocks."""
    layers, blocks = [], set()
    for entry, (up, down, _) in lora.modules():
        layers.append(_layer(entry, up, down, lora.alphas.get(entry.key)))
        if len(entry.rows) > 1 and block_rank(up, entry.rows) == entry.rank / len(entry.rows):
            blocks.add(entry.key)
    return layers, blocks


def _layer(entry: Entry, up: Tensor, down: Tensor, alpha: float | None) -> Layer:
    up, down = up.double().flatten(1), down.double().flatten(1)
    about = entry.key, entry.place.modules, entry.weight, entry.rank, alpha
    if not (up.isfinite().all() and down.isfinite().all()):
        return Layer(*about, math.nan, math.nan, math.nan)
    if not (up.any() and down.any()):
        return Layer(*about, 0.0, 0.0, 0.0)
    sizes = float(up.abs().amax()), float(down.abs().amax())  # squares of tiny numbers would vanish
    grams = [(factor.T @ factor)[None] for factor in (up / sizes[0], down.T / sizes[1])]
    values = singular_values(*grams)
    return Layer(*about, float(values.norm()) * sizes[0] * sizes[1], float(entropy_rank(values)),
                 float(stable_rank(values)))
