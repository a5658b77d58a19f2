"""Reads a written LoRA file back and compares its ΔW, module by module, with the live adapter's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import UserError
from trainer.export import names
from trainer.export.stacked import Pair, apart


@dataclass(frozen=True)
class Comparison:
    """Worst ‖ΔW_file − ΔW‖_F / ‖ΔW‖_F, names on one side only, modules without effect, tensors in all."""

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
    try:
        with safe_open(path, framework="pt") as file:
            return _compare(file, pairs, family)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file ({error}). Export it again.") from error


def _compare(file: safe_open, pairs: Iterable[Pair], family: str) -> Comparison:
    stored, unmatched = _index(file, family)
    worst, zero = 0.0, []
    for name, up, down, magnitude in apart(pairs):
        key = names.key_of(name, family)
        if key is None or key not in stored:
            unmatched.append(name)
            continue
        live = _module(up, down, magnitude)
        worst = max(worst, _rel_error(_read(file, stored.pop(key)), live))
        if _norm(live.up, live.down) == 0.0 and live.magnitude is None:
            zero.append(name)
    for key, parts in stored.items():
        extra = _read(file, parts)
        if _norm(extra.up, extra.down) > 0.0 or extra.magnitude is not None:
            unmatched.append(key)
    return Comparison(worst, unmatched, zero, len(file.keys()))


def _index(file: safe_open, family: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """key → part → tensor name of every module that can be read; beside it the tensors that cannot."""
    modules: dict[str, dict[str, str]] = {}
    unmatched: list[str] = []
    for tensor in file.keys():
        found = names.split(tensor, family)
        if found is None or names.path_of(found[0], family) is None:
            unmatched.append(tensor)
        else:
            modules.setdefault(found[0], {})[found[1]] = tensor
    for key in [key for key, parts in modules.items() if not {"up", "down"} <= parts.keys()]:
        unmatched += modules.pop(key).values()
    return modules, unmatched


def _read(file: safe_open, parts: dict[str, str]) -> Module:
    up, down = file.get_tensor(parts["up"]), file.get_tensor(parts["down"])
    scale = file.get_tensor(parts["alpha"]).item() / down.shape[0] if "alpha" in parts else 1.0
    return _module(up.double() * scale, down, file.get_tensor(parts["dora"]) if "dora" in parts else None)


def _module(up: Tensor, down: Tensor, magnitude: Tensor | None) -> Module:
    """Flattened to matrices: a convolution's ΔW is up [m, r] times down [r, c k k]."""
    up, down = (t.detach().to("cpu", torch.float64).flatten(1) for t in (up, down))
    return Module(up, down, None if magnitude is None else magnitude.detach().to("cpu", torch.float64))


def _rel_error(stored: Module, live: Module) -> float:
    if stored.up.shape[0] != live.up.shape[0] or stored.down.shape[1] != live.down.shape[1]:
        return math.inf
    difference = _norm(torch.cat([stored.up, live.up], 1), torch.cat([stored.down, -live.down]))
    return max(_ratio(difference, _norm(live.up, live.down)),
               _magnitude_error(stored.magnitude, live.magnitude))


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
