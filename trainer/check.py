"""Finds out everything about a run that can be known without training: faults, sizes, memory, time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from trainer import download, families, forecast, gpu, speed
from trainer.adapters import median_size
from trainer.adapters.target import Target, check_targets, part_rows
from trainer.adapters.transfer import check_pairs
from trainer.data.cache import Cache
from trainer.errors import UserError, naming
from trainer.export import reader
from trainer.export.stacked import together
from trainer.families import hub
from trainer.material import Material
from trainer.memory.meter import available
from trainer.memory.plan import WORDS
from trainer.memory.trace import META
from trainer.metrics.features import find_weights
from trainer.optim import check_packages
from trainer.quantize.available import check_settings
from trainer.record import clock
from trainer.runner import chosen_gpus
from trainer.schema import Preset
from trainer.session import LATENT_DTYPE, find_targets, open_base, pick_device, pick_dtype
from trainer.setup import check_warm_up

COLUMN = 22  # width of the first column of the report


@dataclass
class Report:
    """What a check found: faults that would end the run, things worth knowing, and facts by name."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, float | None] = field(default_factory=dict)  # for programs: bytes, seconds, counts

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def as_text(self) -> str:
        """The report for a person."""
        lines = [f"{name:<{COLUMN}}{_say(value)}" for name, value in self.facts.items()]
        lines += [f"warning: {text}" for text in self.warnings] + [f"error: {text}" for text in self.errors]
        return "\n".join([*lines, "" if self.errors else "ready to train"])


class Layers(NamedTuple):
    """What an adapter is put on."""

    denoiser: nn.Module  # on the meta device
    trained: int  # numbers


def inspect(preset: Preset, workspace: Path) -> Report:
    """Check a preset against the disk and the machine; a fault in one part does not hide those in another."""
    report = Report()
    base = _collect(report, lambda: _base(preset, report))
    material = _collect(report, lambda: _data(preset, workspace, report))
    layers = _collect(report, lambda: _adapter(preset, base, report)) if base else None
    device = _collect(report, lambda: _device(preset))
    _collect(report, lambda: find_weights(preset.evaluate.distance, preset.evaluate.inception_weights))
    if device is not None:
        _collect(report, lambda: check_settings(preset.memory.quantize, preset.memory.quantize_text_encoder, device))
        _collect(report, lambda: check_packages(preset.train.optimizer))
        report.facts["device"] = speed.device_name(device, _gpus(preset))
    if base and layers and material and device is not None and not report.errors:
        _collect(report, lambda: _memory_and_disk(preset, base, layers, material, workspace, device, report))
    if material and device is not None:
        _time(preset, workspace, device, report)
    return report


def _memory_and_disk(preset: Preset, base: Any, layers: Layers, material: Material, workspace: Path,
                     device: torch.device, report: Report) -> None:
    """What the run will take, beside what there is."""
    cache, dtype, limit = Cache(workspace / "cache"), pick_dtype(preset, device), _limit(preset, device, report)
    prompts = forecast.texts_to_encode(preset, base, material, cache, dtype, "none")
    known = speed.recall(workspace, preset, speed.device_name(device, _gpus(preset)))
    found = forecast.memory(preset, base, layers.denoiser, material, device, limit, known, prompts > 0, _gpus(preset))
    if found.text_mode != "none":
        prompts = forecast.texts_to_encode(preset, base, material, cache, dtype, found.text_mode)
    disk = forecast.disk(preset, base, material, cache, dtype, prompts, layers.trained)
    host = forecast.host_bytes(found, disk.caches)
    report.facts["held as"] = found.plan.in_words(found.blocks)
    if limit is None:
        _tell_memory("memory", found, found.peak + host, psutil.virtual_memory().total, report)
    else:
        _tell_memory("GPU memory", found, found.peak, limit, report)
        there = psutil.virtual_memory().total
        report.facts["memory"] = f"about {_gib(host)} of {_gib(there)} GiB"
        if found.estimate.host:
            report.facts["memory"] += f", {_gib(found.estimate.host)} of them the blocks that are kept there"
        if host > there:
            report.warnings.append(f"the computer's memory is too small for this: about {_gib(host)} GiB are needed. "
                                   "Make memory.offload_blocks smaller")
    report.facts["disk"] = (f"{_size(disk.caches)} for caches, {_size(disk.checkpoints)} for checkpoints and files; "
                            f"{_size(disk.free)} are free")
    if disk.caches + disk.checkpoints > disk.free:
        report.warnings.append(f"the disk of {workspace} is too full for this: {_size(disk.free)} are free, and about "
                               f"{_size(disk.caches + disk.checkpoints)} are needed. Free some space")
    report.numbers |= {"peak": found.peak, "limit": limit, "host": host, "disk": disk.caches + disk.checkpoints,
                       "disk_free": disk.free}


def _device(preset: Preset) -> torch.device:
    """The device, or the first of several GPUs, all of which have to be there."""
    for number in chosen_gpus(preset.memory.device):
        gpu.pick_device(f"cuda:{number}", "memory.device")
    return pick_device(preset)


def _gpus(preset: Preset) -> int:
    """How many GPUs the preset names; one, where it leaves the choice."""
    return max(1, len(chosen_gpus(preset.memory.device)))


def _limit(preset: Preset, device: torch.device, report: Report) -> int | None:
    """Bytes of the GPU that the run may take; None for a device whose memory is not counted."""
    if device.type != "cuda":
        return None
    try:
        return available(device, preset.memory.budget_gb)
    except UserError as error:  # another run may have it now, and this one would wait for it
        report.warnings.append(str(error))
        return torch.cuda.get_device_properties(device).total_memory


def _tell_memory(name: str, found: forecast.Memory, needed: int, there: int, report: Report) -> None:
    """The peak and what it is made of; more than there is is worth a warning."""
    estimate = found.estimate
    parts = ("measured in an earlier run like this" if found.measured else
             f"weights {_gib(estimate.weights)}, adapter {_gib(estimate.adapter)}, a step {_gib(estimate.step)}")
    report.facts[name] = f"about {_gib(needed)} of {_gib(there)} GiB ({parts})"
    if found.text:
        held = f" in {WORDS[found.text_mode]}" if found.text_mode != "none" else ""
        report.facts["text encoder"] = f"{_gib(found.text)} GiB{held}, while it encodes the captions before training"
    if needed > there:
        report.warnings.append("this will hardly fit: make train.batch_size or data.resolution smaller, "
                               "or leave what [memory] fixes to auto")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


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
    order = material.order(store, preset.train.batch_size * preset.train.grad_accum * _gpus(preset))
    steps = preset.train.steps or (preset.train.epochs or 0) * order.steps_per_epoch
    report.facts["steps"] = steps
    report.facts["epochs"] = round(steps / order.steps_per_epoch, 2)
    _collect(report, lambda: check_warm_up(preset, steps))
    return material


def _adapter(preset: Preset, base: Any, report: Report) -> Layers:
    """Layers and trained numbers, from the model's skeleton: no weights are loaded."""
    family, chosen = families.get(preset.model.family), preset.adapter
    models = {family.DENOISER: family.load_denoiser(base, META, torch.float32)}
    if "text_encoder" in chosen.targets:
        models["text_encoder"] = family.load_text_encoder(base, META, torch.float32)
    targets = find_targets(preset, models)
    groups: dict[str, list[int]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(_trained(preset, target))
    trained = sum(map(sum, groups.values()))
    report.facts["adapter"] = f"{chosen.method}, rank {chosen.rank}, {len(targets)} layers, {trained:,} parameters"
    report.facts["layers"] = "; ".join(f"{group} {len(counts)} ({sum(counts) / 1e6:.2f} M)"
                                       for group, counts in groups.items())
    report.numbers |= {"layers": len(targets), "parameters": trained}
    check_targets(targets, chosen.rank)
    if chosen.method == "stella" and chosen.gradient_scaling:
        d = chosen.scale_dim or median_size(targets)
        report.facts["gradient scaling"] = f"d = {d:g}, lr·√d = {preset.train.lr * d**0.5:.3g}"
    if chosen.start_from:
        pairs = together(reader.read(Path(chosen.start_from), family=preset.model.family), part_rows(targets))
        with naming(f"adapter.start_from: {chosen.start_from}"):
            check_pairs(targets, chosen.dora, pairs)
        report.facts["continues"] = f"{chosen.start_from}, {len(pairs)} layers"
    return Layers(models[family.DENOISER], trained)


def _trained(preset: Preset, target: Target) -> int:
    """Numbers that are trained for a layer."""
    chosen = preset.adapter
    core = 0 if chosen.method in ("lora", "stiefel") else chosen.rank if chosen.diagonal else chosen.rank**2
    return chosen.rank * (target.rows + target.columns) + core + (target.inputs if chosen.dora else 0)


def _time(preset: Preset, workspace: Path, device: torch.device, report: Report) -> None:
    known = speed.recall(workspace, preset, speed.device_name(device, _gpus(preset)))
    if known is None or "sec" not in known:  # a run may have measured its memory and no more
        report.facts["time"] = "unknown until a probe: it is measured when a run like this one trains here"
        return
    seconds = known["sec"]
    report.numbers |= {"sec_per_it": seconds, "sec": seconds * report.facts["steps"]}
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
