"""Reads a written LoRA file back and compares its ΔW, module by module, with the live adapter's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.export import names
from trainer.export.lora_file import open_lora
from trainer.export.stacked import Pair, apart


@dataclass(frozen=True)
class Comparison:
    """Worst ‖ΔW_file − ΔW‖_F / ‖ΔW‖_F (NaN where one is none), names on one side only, modules without effect, tensors
    in all.

    DoRA's magnitudes are compared with their own size, not with what they change, which the base's weights would have
    to tell; our files hold them in fp32, where they agree to the last bit.
    """

    worst_rel_error: float
    unmatched: list[str]
    zero: list[str]
    tensors: int


@dataclass(frozen=True)
class Module:
    """One module in fp64: ΔW = up down [m, n], the scale alpha/rank being in `up`, and DoRA's magnitude."""

    up: Tensor  # m r
    down: Tensor  # r n
    magnitude: Tensor | None


def compare(path: Path, pairs: Iterable[Pair], *, family: str) -> Comparison:
    """Compare a file with the pairs it was written from (shapes as in `writer.write`).

    `unmatched` holds tensors that the family's map cannot name, live modules that the file lacks, and modules
    that the file has and the adapter has not (unless they are zero, as untrained projections are). Raises
    `UserError` when the file cannot be read.
    """
    lora = open_lora(path, family=family)
    unmatched = [*lora.unknown, *(name for tensors in lora.incomplete.values() for name in tensors)]
    live = {names.canonical(name): (name, factors) for name, *factors in apart(pairs)}
    worst, zero = 0.0, [name for name, factors in live.values() if _idle(_module(*factors))]
    for name, *factors in lora.pairs():
        stored = _module(*factors)
        if name in live:
            worst = _worse(worst, _rel_error(stored, _module(*live.pop(name)[1])))
        elif not _idle(stored):
            unmatched.append(name)
    for key, (name, _) in live.items():  # of fused rows, a part without any change does not come back
        place = lora.naming.of(key)
        if name not in zero or place is None or place.key not in lora.entries:
            unmatched.append(name)
    return Comparison(worst, unmatched, zero, len(lora.header.tensors))


def _idle(module: Module) -> bool:
    """Whether it changes nothing."""
    return module.magnitude is None and _norm(module.up, module.down) == 0.0


def _module(up: Tensor, down: Tensor, magnitude: Tensor | None) -> Module:
    """Flattened to matrices: a convolution's ΔW is up [m, r] times down [r, c k k]."""
    up, down = (t.detach().to("cpu", torch.float64).flatten(1) for t in (up, down))
    return Module(up, down, None if magnitude is None else magnitude.detach().to("cpu", torch.float64))


def _rel_error(stored: Module, live: Module) -> float:
    if stored.up.shape[0] != live.up.shape[0] or stored.down.shape[1] != live.down.shape[1]:
        return math.inf
    difference = _norm(torch.cat([stored.up, live.up], 1), torch.cat([stored.down, -live.down]))
    return _worse(_ratio(difference, _norm(live.up, live.down)), _magnitude_error(stored.magnitude, live.magnitude))


def _worse(one: float, other: float) -> float:
    """The larger error; NaN is worse than any, which `max` may pass over."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _magnitude_error(stored: Tensor | None, live: Tensor | None) -> float:
    if stored is None and live is None:
        return 0.0
    if stored is None or live is None or stored.shape != live.shape:
        return math.inf
    return _ratio(float((stored - live).norm()), float(live.norm()))


def _ratio(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / size if size else math.inf


def _norm(up: Tensor, down: Tensor) -> float:
    """‖up down‖_F without the m×n product, by QR to r×r (Gram matrices would square small errors away)."""
    left = torch.linalg.qr(up, mode="r").R
    right = torch.linalg.qr(down.T, mode="r").R
    return float((left @ right.T).norm())
