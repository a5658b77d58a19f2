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
from trainer.files import sync_folder
from trainer.run import Run

# 2: how the model was held; 3: what chooses the best, and an early stop; 4: how layers multiply; 5: no count of skips
FORMAT = 5


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    global_batch: int = 0  # samples an optimizer step
    data: str = ""  # fingerprint of the data set
    validation: dict[str, float] = field(default_factory=dict)  # step -> loss
    by_image: dict[str, list[float]] = field(default_factory=dict)  # the same of each held-out image, of saved steps
    measured: str = ""  # fingerprint of what those losses are measured with
    early: str = ""  # why the run ended early
    fresh: list[str] = field(default_factory=list)  # of a branch: what does not go on from the other run
    patient_since: int = 0  # the step after which validations without a gain are counted
    plan: dict[str, Any] = field(default_factory=dict)  # `memory.plan.Plan`, for a resume holds the model alike
    text_quantize: str = "none"  # how the text encoder was held that made the cached embeddings
    attention: str = "usual"  # whose kernels attention prefers: usual, flash, cudnn, efficient
    matmul: str = "off"  # how frozen layers multiply: off, fp8, int8; auto: to be decided anew


def save(run: Run, progress: Progress, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> int:
    """Write `checkpoints/step_…`: aside, fsynced, then renamed.  Returns its size in bytes.

    adapter, optimizer: flat states, tensors by name.

    Raises `OSError` (a full disk) with nothing left behind and older checkpoints untouched.
    """
    target = run.checkpoint(progress.step)
    if target.exists():
        return size(target)
    run.checkpoints.mkdir(exist_ok=True)
    aside = run.checkpoints / f".{target.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        _write_tensors(aside / "adapter.safetensors", adapter)
        _write_tensors(aside / "optimizer.safetensors", optimizer)
        _write_text(aside / "progress.json", json.dumps({"format": FORMAT, **asdict(progress)}))
        sync_folder(aside)
        os.replace(aside, target)
        sync_folder(run.checkpoints)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return size(target)


def last_progress(run: Run) -> Progress | None:
    """How far a run's last checkpoint is; None without one.  Raises `UserError` as `load` does."""
    step = run.last_step()
    return _progress(run.checkpoint(step)) if step else None


def load(folder: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    """Progress, the adapter's and the optimizer's state of a checkpoint.

    Raises `UserError` for one that is damaged or of a later program.
    """
    progress = _progress(folder)
    try:
        return progress, load_file(folder / "adapter.safetensors"), load_file(folder / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, error) from None


def _progress(folder: Path) -> Progress:
    try:
        stored = json.loads((folder / "progress.json").read_text())
        if stored.pop("format") > FORMAT:
            raise UserError(f"{folder} was written by a newer version of this program; update it to go on")
        return Progress(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder} is damaged ({error}); delete that folder to resume from the one before")


def prune(run: Run, keep: int, best: Collection[int] = ()) -> list[int]:
    """Delete all checkpoints but the last `keep`, the best and the pinned, with their exports; returns what went."""
    steps = run.checkpoint_steps()
    gone = [step for step in steps[:-keep]
            if step not in best and not run.is_pinned(step)]
    for step in gone:
        run.export_of(step).unlink(missing_ok=True)  # first: while the checkpoint is there, a kill is made good
        shutil.rmtree(run.checkpoint(step), ignore_errors=True)
    return gone


def remove_remains(run: Run) -> None:
    """Clear away what a killed writer left half done: checkpoints, exports, pictures."""
    for path in run.checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*run.path.glob(".*.partial"), *run.exports.glob(".*.partial"), *run.samples.glob("*.tmp"),
                 *run.path.glob(".preset.toml.*")):
        path.unlink(missing_ok=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor by itself: safetensors refuses shared memory."""
    copies = {key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
              for key, value in tensors.items()}
    try:
        save_file(copies, path)
    except SafetensorError as error:  # it hides the system's error, such as a full disk, in its text
        raise OSError(str(error)) from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def size(folder: Path) -> int:
    """Bytes of a checkpoint."""
    return sum(file.stat().st_size for file in folder.iterdir())
