"""Finds out everything about a run that can be known without training: faults, sizes, memory, time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer import download, families, speed
from trainer.adapters import median_size
from trainer.adapters.target import check_targets, part_rows
from trainer.adapters.transfer import check_pairs
from trainer.data.cache import Cache
from trainer.errors import UserError
from trainer.export import reader
from trainer.export.stacked import together
from trainer.families import hub
from trainer.material import Material
from trainer.metrics.features import find_weights
from trainer.quantize.available import check_settings
from trainer.record import clock
from trainer.schema import Preset
from trainer.session import LATENT_DTYPE, find_targets, open_base, pick_device, pick_dtype

OVERHEAD = 0.4  # GiB that CUDA and its libraries hold beside tensors
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "scaled_adamw": 8, "sgd": 4, "stiefel": 4}  # state per trained number
COLUMN = 22  # width of the first column of the report


@dataclass
class Report:
    """What a check found: faults that would end the run, things worth knowing, and facts by name."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def as_text(self) -> str:
        """The report for a person."""
        lines = [f"{name:<{COLUMN}}{_say(value)}" for name, value in self.facts.items()]
        lines += [f"warning: {text}" for text in self.warnings] + [f"error: {text}" for text in self.errors]
        return "\n".join([*lines, "" if self.errors else "ready to train"])


def inspect(preset: Preset, workspace: Path) -> Report:
    """Check a preset against the disk and the machine; a fault in one part does not hide those in another."""
    report = Report()
    base = _collect(report, lambda: _base(preset, report))
    material = _collect(report, lambda: _data(preset, workspace, report))
    layers = _collect(report, lambda: _adapter(preset, base, report)) if base else None
    device = _collect(report, lambda: pick_device(preset))
    _collect(report, lambda: find_weights(preset.evaluate.distance, preset.evaluate.inception_weights))
    if device is not None:
        _collect(report, lambda: check_settings(preset.memory.quantize, preset.memory.quantize_text_encoder, device))
    if base and layers and device is not None:
        _memory(memory(preset, base.params, layers, device), device, report)
    if material and device is not None:
        _time(preset, workspace, device, report)
    return report


def memory(preset: Preset, params: dict[str, int], trained: int, device: torch.device) -> float:
    """Bytes that training takes at its peak: frozen weights, adapter with optimizer, activations.

    params: weights of each part of the base; trained: numbers in the adapter.
    """
    width = BYTES[pick_dtype(preset, device)]
    train, family = preset.train, families.get(preset.model.family)
    weights = params[family.DENOISER] * width
    if "text_encoder" in preset.adapter.targets:
        weights += sum(count for name, count in params.items() if name.startswith("text_encoder")) * width
    adapter = trained * (4 + 4 + width + OPTIMIZER_BYTES[train.optimizer] + (4 if train.ema_decay else 0))
    per_pixel = family.ACTIVATION_BYTES[preset.memory.gradient_checkpointing == "full"] * width / 2
    activations = per_pixel * preset.data.resolution**2 * train.batch_size
    return weights + adapter + activations + (OVERHEAD * 2**30 if device.type == "cuda" else 0)


def _memory(needed: float, device: torch.device, report: Report) -> None:
    """Bytes needed beside those of the device; more than there are is worth a warning, for the estimate is rough."""
    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    report.facts["memory"] = f"about {needed / 2**30:.1f} of {there / 2**30:.1f} GiB"
    if needed > there:
        report.warnings.append("this will hardly fit: make train.batch_size or data.resolution smaller, "
                               "or set memory.gradient_checkpointing = 'full'")


def _base(preset: Preset, report: Report) -> Any:
    """The base, opened; None when it is still on the hub: a check downloads nothing."""
    plans = download.missing(preset)
    for plan in plans:
        report.facts["download"] = f"{plan.repo}, {download.size(plan.bytes)}, comes when training starts"
        hub.check_room(plan)
    if plans:
        report.warnings.append("the base model is not on this machine yet: its layers and memory cannot be told")
        return None
    base = open_base(preset)
    report.facts["base model"] = f"{base.name}: {sum(base.params.values()) / 1e6:,.0f} M parameters"
    report.facts["predicts"] = base.prediction_type + ("" if base.prediction_told else " (assumed)")
    report.warnings += base.notes
    return base


def _data(preset: Preset, workspace: Path, report: Report) -> Material:
    family = families.get(preset.model.family)
    material = Material(preset, family.bucket_step(preset.data.resolution))
    report.warnings += [f"{skipped.file} will be skipped: {skipped.reason}" for skipped in material.skipped]
    report.facts["training images"] = len(material.train)
    report.facts["held-out images"] = len(material.held)
    report.facts |= {"remarks": "; ".join(material.remarks)} if material.remarks else {}
    if without := sum(not item.caption for item in material.train):
        report.warnings.append(f"{without} of {len(material.train)} training images have no caption")
    if not material.held:
        report.warnings.append("no held-out images: nothing can tell whether the adapter is overfitted; "
                               "set evaluate.folder or evaluate.holdout")
    buckets = Counter(material.size(item) for item in material.train)
    report.facts["buckets"] = {f"{width}×{height}": count for (width, height), count in sorted(buckets.items())}
    cache = Cache(workspace / "cache")
    store = material.latent_store(material.trained, cache, "", LATENT_DTYPE, training=True)
    order = material.order(store, preset.train.batch_size * preset.train.grad_accum)
    steps = preset.train.steps or (preset.train.epochs or 0) * order.steps_per_epoch
    report.facts["steps"] = steps
    report.facts["epochs"] = round(steps / order.steps_per_epoch, 2)
    return material


def _adapter(preset: Preset, base: Any, report: Report) -> int:
    """Layers and trained numbers, from the model's skeleton: no weights are loaded."""
    family, chosen = families.get(preset.model.family), preset.adapter
    models = {family.DENOISER: family.load_denoiser(base, torch.device("meta"), torch.float32)}
    if "text_encoder" in chosen.targets:
        models["text_encoder"] = family.load_text_encoder(base, torch.device("meta"), torch.float32)
    targets = find_targets(preset, models)
    core = 0 if chosen.method in ("lora", "stiefel") else chosen.rank if chosen.diagonal else chosen.rank**2
    trained = sum(chosen.rank * (target.rows + target.columns) + core + (target.inputs if chosen.dora else 0)
                  for target in targets)
    report.facts["adapter"] = f"{chosen.method}, rank {chosen.rank}, {len(targets)} layers, {trained:,} parameters"
    check_targets(targets, chosen.rank)
    if chosen.method == "stella" and chosen.gradient_scaling:
        d = chosen.scale_dim or median_size(targets)
        report.facts["gradient scaling"] = f"d = {d:g}, lr·√d = {preset.train.lr * d**0.5:.3g}"
    if chosen.start_from:
        pairs = together(reader.read(Path(chosen.start_from), family=preset.model.family), part_rows(targets))
        check_pairs(targets, chosen.dora, pairs)
        report.facts["continues"] = f"{chosen.start_from}, {len(pairs)} layers"
    return trained


def _time(preset: Preset, workspace: Path, device: torch.device, report: Report) -> None:
    known = speed.recall(workspace, preset, speed.device_name(device))
    report.facts["device"] = speed.device_name(device)
    if known is None or "sec" not in known:  # a run may have measured its memory and no more
        report.facts["time"] = "unknown until a run like this one was made here"
        return
    seconds = known["sec"]
    report.facts["time"] = f"{seconds:.2f} s/it, {clock(seconds * report.facts['steps'])} in all"


def _collect(report: Report, part: Callable[[], Any]) -> Any:
    """Run one part of the check; its fault goes to the report."""
    try:
        return part()
    except UserError as error:
        report.errors.append(str(error))
        return None


def _say(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} at {name}" for name, count in value.items())
    return str(value)
