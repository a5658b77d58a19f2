"""Remembers how fast this machine trained, so that the next run's time can be told before it starts."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import write_atomic
from trainer.schema import Preset

if TYPE_CHECKING:
    from trainer.session import Session


def remember(session: Session) -> None:
    """Put down seconds per step and peak memory of a run that has trained."""
    import torch

    seconds = session.recorder.seconds_per_step()
    if seconds is None:
        return
    peak = torch.cuda.max_memory_allocated(session.device) if session.device.type == "cuda" else None
    path = _path(session.cache.root.parent)
    known = _read(path)
    known[_key(session.preset, device_name(session.device))] = {"sec": seconds, "vram_peak": peak}
    write_atomic(path, json.dumps(known, indent=1).encode())


def recall(workspace: Path, preset: Preset, device: str) -> dict[str, Any] | None:
    """Seconds per step (`sec`) and bytes (`vram_peak`) of the same work on the same device, if done here before."""
    return _read(_path(workspace)).get(_key(preset, device))


def device_name(device: Any) -> str:
    """The GPU's or the processor's name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def _path(workspace: Path) -> Path:
    return workspace / "cache" / "speed.json"


def _key(preset: Preset, device: str) -> str:
    """What a step's time depends on."""
    adapter, train = preset.adapter, preset.train
    return " ".join(str(part) for part in (
        device, preset.model.family, Path(preset.model.base).name, preset.data.resolution, train.batch_size,
        train.grad_accum, train.precision, adapter.method, adapter.rank, adapter.dora, *sorted(adapter.targets),
        preset.memory.gradient_checkpointing))


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
