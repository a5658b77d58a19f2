"""Remembers how fast this machine trained, so that the next run's time can be told before it starts."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.files import write_atomic
from trainer.memory.plan import LADDER, Plan
from trainer.schema import Preset


def remember(workspace: Path, preset: Preset, device: Any, seconds: float | None, gpus: int = 1) -> None:
    """Put down seconds per step (None: no step was made) and the GPU's peak memory of a run that has trained, on so
    many GPUs."""
    import torch

    if seconds is None:
        return
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    _add(workspace, preset, device_name(device, gpus), sec=seconds, vram_peak=peak)


def remember_plan(workspace: Path, preset: Preset, device: str, plan: Plan, peak: int, limit: int) -> None:
    """Put down which plan was found to fit `limit` bytes, and how many it takes at its peak."""
    _add(workspace, preset, device, plan=asdict(plan), peak=peak, limit=limit, ladder=LADDER)


def recall(workspace: Path, preset: Preset, device: str) -> dict[str, Any] | None:
    """What is known of the same work on the same device, as far as it was done here before.

    Of a whole run: seconds per step (`sec`), and bytes at the peak with pictures and all (`vram_peak`). Of what was
    measured before its first step: `plan`, `peak` and `limit` as in `remember_plan`, and which `ladder` it was of.
    """
    return _read(_path(workspace)).get(_key(preset, device))


def remember_attention(workspace: Path, key: str, chosen: str) -> None:
    """Put down which kernels of attention were found to be the fastest for what `key` tells."""
    known = _read(_path(workspace))
    write_atomic(_path(workspace), json.dumps(known | {key: {"attention": chosen}}, indent=1).encode())


def recall_attention(workspace: Path, key: str) -> str | None:
    """The kernels of `remember_attention`; None: nothing is known."""
    facts = _read(_path(workspace)).get(key)
    return facts.get("attention") if isinstance(facts, dict) else None


def seconds_anywhere(workspace: Path, preset: Preset) -> float | None:
    """Seconds per step of the same work on whichever device did it here; the slowest, where there are several."""
    work = _key(preset, "")
    found = [facts.get("sec") for key, facts in _read(_path(workspace)).items()
             if key.endswith(work) and isinstance(facts, dict)]
    return max((float(sec) for sec in found if isinstance(sec, (int, float))), default=None)


def _add(workspace: Path, preset: Preset, device: str, **facts: Any) -> None:
    path, key = _path(workspace), _key(preset, device)
    known = _read(path)
    before = known.get(key)
    known[key] = (before if isinstance(before, dict) else {}) | facts
    write_atomic(path, json.dumps(known, indent=1).encode())


def device_name(device: Any, gpus: int = 1) -> str:
    """The GPU's or the processor's name, or that of several which train or hold a model together."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return name if gpus == 1 else f"{gpus} × {name}"


def _path(workspace: Path) -> Path:
    return workspace / "cache" / "speed.json"


def _key(preset: Preset, device: str) -> str:
    """What a step's time and memory depend on."""
    adapter, train, memory = preset.adapter, preset.train, preset.memory
    return " ".join(str(part) for part in (
        device, preset.model.family, Path(preset.model.base).name, preset.data.resolution, train.batch_size,
        train.grad_accum, train.precision, train.optimizer, train.ema_decay > 0, adapter.method, adapter.rank,
        adapter.init, adapter.dora, adapter.dropout > 0, adapter.fuse_qkv, adapter.target_pattern,
        *sorted(adapter.targets), memory.quantize, memory.gradient_checkpointing, memory.offload_blocks,
        *(["shard", memory.shard] if memory.shard != "auto" else []),
        *(["matmul", train.matmul] if train.matmul != "auto" else []),
        memory.budget_gb, memory.cuda_graphs, train.compile))


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
