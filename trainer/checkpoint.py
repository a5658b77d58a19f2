"""Saves everything that a run is, atomically, and restores it to the bit.

Data order, noise, crops, captions and dropout are functions of (seed, step), so the adapter, the optimizer and the
step number are a run's whole state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import UserError
from trainer.run import Run

FORMAT = 1
PINNED = "pinned"  # a file of this name in a checkpoint keeps it


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    global_batch: int = 0  # samples an optimizer step
    validation: dict[str, float] = field(default_factory=dict)  # step -> loss


def save(run: Run, progress: Progress, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> int:
    """Write `checkpoints/step_…`: aside, fsynced, then renamed.  Returns its size in bytes.

    Raises `OSError` (a full disk) with nothing left behind and older checkpoints untouched.
    """
    target = run.checkpoint(progress.step)
    if target.exists():
        return _size(target)
    run.checkpoints.mkdir(exist_ok=True)
    aside = run.checkpoints / f".{target.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        tensors, rest = _flatten(optimizer)
        _write_tensors(aside / "adapter.safetensors", adapter)
        _write_tensors(aside / "optimizer.safetensors", tensors)
        _write_text(aside / "optimizer.json", json.dumps(rest))
        _write_text(aside / "progress.json", json.dumps({"format": FORMAT, **asdict(progress)}))
        _sync_folder(aside)
        os.replace(aside, target)
        _sync_folder(run.checkpoints)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return _size(target)


def load(folder: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Any]]:
    """Progress, the adapter's state and the optimizer's `state_dict` of a checkpoint.

    Raises `UserError` for one that is damaged or of a later program.
    """
    try:
        stored = json.loads((folder / "progress.json").read_text())
        if stored.pop("format") > FORMAT:
            raise UserError(f"{folder} was written by a newer version of this program; update it to go on")
        rest = json.loads((folder / "optimizer.json").read_text())
        adapter = load_file(folder / "adapter.safetensors")
        return Progress(**stored), adapter, _unflatten(load_file(folder / "optimizer.safetensors"), rest)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete that folder to resume from the one before") from None


def prune(run: Run, keep: int, best: Collection[int] = ()) -> list[int]:
    """Delete all checkpoints but the last `keep`, the best and the pinned, with their exports; returns what went."""
    steps = run.checkpoint_steps()
    gone = [step for step in steps[:-keep]
            if step not in best and not (run.checkpoint(step) / PINNED).exists()]
    for step in gone:
        shutil.rmtree(run.checkpoint(step), ignore_errors=True)
        run.export_of(step).unlink(missing_ok=True)
    return gone


def remove_remains(run: Run) -> None:
    """Clear away what a killed writer left half done."""
    for path in run.checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def drop_after(run: Run, step: int) -> None:
    """Forget checkpoints later than the one a run is resumed from."""
    for later in run.checkpoint_steps():
        if later > step:
            shutil.rmtree(run.checkpoint(later), ignore_errors=True)
            run.export_of(later).unlink(missing_ok=True)


def _flatten(value: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a nested state into its tensors by path, and the rest with each tensor's path in its place."""
    if isinstance(value, Tensor):
        return {prefix: value}, {"tensor": prefix}
    tensors: dict[str, Tensor] = {}
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            inner, rest = _flatten(item, f"{prefix}/{key}")
            tensors |= inner
            pairs.append([key, rest])
        return tensors, {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{prefix}/{index}") for index, item in enumerate(value)]
        for inner, _ in items:
            tensors |= inner
        return tensors, {"list" if isinstance(value, list) else "tuple": [rest for _, rest in items]}
    return {}, {"value": value}


def _unflatten(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    (kind, value), = rest.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unflatten(tensors, item) for key, item in value}
    if kind in ("list", "tuple"):
        items = [_unflatten(tensors, item) for item in value]
        return items if kind == "list" else tuple(items)
    return value


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor by itself: safetensors refuses shared memory."""
    save_file({key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
               for key, value in tensors.items()}, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename outlive a power cut; Windows has no such call and needs none."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
