"""The header texts of a LoRA file: what UIs show, the preset that made it, and nothing private."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from trainer import schema
from trainer.preset import dumps
from trainer.schema import Preset, Section

# ComfyUI shows no metadata when the header exceeds 1 MiB; the table of tensors takes up to a third of that.
TAG_BYTES = 256 * 1024
COVER_BYTES = 72 * 1024  # of a cover's JPEG; it stands in the header twice, and grows by a third as text
TAG_LENGTH = 120  # longer "tags" are sentences of a caption
PRESET_KEY = "stiefel_studio_preset"


@dataclass(frozen=True)
class Base:
    """What a model is called: by sd-scripts and ai-toolkit, by Stability's specification, and whose layout it has."""

    version: str
    architecture: str
    implementation: str


_FLUX2 = "https://github.com/black-forest-labs/flux2"
BASES = {  # by family, and variant where there are several
    "sd15": Base("sd_v1", "stable-diffusion-v1/lora", "diffusers"),
    "sdxl": Base("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "diffusers"),
    "flux1": Base("flux1", "flux-1-dev/lora", "https://github.com/black-forest-labs/flux"),
    "flux1-schnell": Base("flux1", "flux-1-schnell/lora", "https://github.com/black-forest-labs/flux"),
    "flux2": Base("flux2", "Flux.2/lora", _FLUX2),
    "flux2-klein": Base("flux2", "Flux.2/lora", _FLUX2),
    "flux2-klein-4b": Base("flux2_klein_4b", "Flux.2/lora", _FLUX2),
    "flux2-klein-9b": Base("flux2_klein_9b", "Flux.2/lora", _FLUX2),
}
UNETS = ("sd15", "sdxl")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "flow": "flow"}


@dataclass(frozen=True)
class Dataset:
    """What was trained on. Folders go by their names; where they lie is nobody's business."""

    folders: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name → repeats, images
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)  # width, height → images
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # folder name → tag → count


def build(*, preset: Preset, run_name: str, dataset: Dataset, prediction: str, rank: int, steps: int,
          epochs: int, global_batch: int, started_at: float, finished_at: float, variant: str = "",
          cover: Path | None = None) -> dict[str, str]:
    """The metadata of a file, all strings: sd-scripts' `ss_*`, `modelspec.*` 1.0.1, and the preset as TOML.

    preset: as the run keeps it, complete; prediction: what the base was found to predict, "epsilon" or
    "v_prediction"; variant: which of its family's models it is; rank: of the file; steps and epochs done; times in
    seconds since 1970; cover: a picture to show. `writer.save` adds what depends on the file: `ss_output_name` and
    the hashes.
    """
    texts = {
        **_training(preset, rank, variant),
        "ss_training_started_at": str(started_at),
        "ss_training_finished_at": str(finished_at),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(steps),
        "ss_num_epochs": str(epochs),
        "ss_total_batch_size": str(global_batch),
        "modelspec.title": preset.output.title or run_name,
        "modelspec.date": datetime.fromtimestamp(finished_at, UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": PREDICTIONS[prediction],
        PRESET_KEY: dumps(preset if preset.output.full_paths else without_paths(preset)),
        **_dataset(dataset),
        **cover_texts(cover),
    }
    return {key: value for key, value in texts.items() if value}


def _training(preset: Preset, rank: int, variant: str) -> dict[str, str]:
    """What the preset says, and which model it was."""
    base = BASES["-".join(filter(None, (preset.model.family, variant)))]
    side, dora = preset.data.resolution, preset.adapter.dora
    options = {"method": preset.adapter.method} | ({"dora_wd": "True", "wd_on_out": "False"} if dora else {})
    return {
        "ss_v2": "False",
        "ss_base_model_version": base.version,
        "ss_sd_model_name": last_part(preset.model.base),
        "ss_network_module": _network_module(preset),
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": _json(options),
        "ss_learning_rate": str(preset.train.lr),
        "ss_optimizer": preset.train.optimizer,
        "ss_seed": str(preset.train.seed),
        "ss_clip_skip": str(preset.model.clip_skip),
        "ss_resolution": f"({side}, {side})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.architecture,
        "modelspec.implementation": base.implementation,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.encoder_layer": str(preset.model.clip_skip),
        "modelspec.author": preset.output.author,
        "modelspec.license": preset.output.license,
        "modelspec.trigger_phrase": preset.data.trigger,
        "trained_words": _json([preset.data.trigger]) if preset.data.trigger else "",
    }


def _network_module(preset: Preset) -> str:
    """sd-scripts' name for the kind of network: LyCORIS made the first with convolutions and DoRA."""
    if preset.adapter.dora or {"convolution", "all"} & set(preset.adapter.targets) and preset.model.family in UNETS:
        return "lycoris.kohya"
    return "networks.lora_flux" if preset.output.format == "F5" and preset.model.family == "flux1" else "networks.lora"


def cover_texts(picture: Path | None) -> dict[str, str]:
    """A small JPEG for programs that show covers: ComfyUI's key, and the model specification's."""
    if picture is None:
        return {}
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    side, content = 512, b""
    while not content or len(content) > COVER_BYTES:
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        content, side = buffer.getvalue(), side * 3 // 4
    text = base64.b64encode(content).decode()
    return {"ssmd_cover_images": _json([text]), "modelspec.thumbnail": f"data:image/jpeg;base64,{text}"}


def without_paths(preset: Preset) -> Preset:
    """The preset with every path cut to its last part."""
    updates: dict[str, Section] = {}
    for name in schema.SECTIONS:
        section = getattr(preset, name)
        values = {key: getattr(section, key) for key in schema.fields(name) if schema.has_path(name, key)}
        updates[name] = section.model_copy(update={
            key: [last_part(v) for v in value] if isinstance(value, list) else last_part(value)
            for key, value in values.items()})
    return preset.model_copy(update=updates)


def last_part(path: str) -> str:
    """The name of a file, folder or hub id, however its system writes paths."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _dataset(dataset: Dataset) -> dict[str, str]:
    """UIs parse these as JSON objects and fail on anything else: what is empty is left out."""
    folders = {last_part(name): {"n_repeats": repeats, "img_count": images}
               for name, (repeats, images) in dataset.folders.items()}
    buckets = {str(i): {"resolution": list(size), "count": count}
               for i, (size, count) in enumerate(sorted(dataset.buckets.items()))}
    tags = capped({last_part(name): counts for name, counts in dataset.tags.items()}, TAG_BYTES)
    found = {"ss_dataset_dirs": folders, "ss_tag_frequency": tags,
             "ss_bucket_info": {"buckets": buckets} if buckets else {}}
    images = sum(folder["img_count"] for folder in folders.values())
    return {key: _json(value) for key, value in found.items() if value} | {"ss_num_train_images": str(images)}


def capped(tags: Mapping[str, Mapping[str, int]], limit: int) -> dict[str, dict[str, int]]:
    """The most frequent tags of all folders that fit into `limit` bytes of the header."""
    ranked = sorted(((count, folder, tag) for folder, counts in tags.items() for tag, count in counts.items()
                     if len(tag) <= TAG_LENGTH), key=lambda item: (-item[0], item[1], item[2]))
    kept: dict[str, dict[str, int]] = {}
    size = 0
    for count, folder, tag in ranked:
        size += _embedded(tag) + len(str(count)) + 2 + (0 if folder in kept else _embedded(folder) + 4)
        if size > limit:
            break
        kept.setdefault(folder, {})[tag] = count
    return kept


def _embedded(text: str) -> int:
    """Bytes that a JSON string takes inside another JSON string."""
    return len(_json(_json(text)).encode())


def _json(value: Any) -> str:  # noqa: ANN401
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
