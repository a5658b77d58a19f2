"""An opened base model: where its parts are and what is known of them before any weight is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.families.tensors import Part


@dataclass(frozen=True)
class Base:
    """What a family's `open_base` found; nothing of it is on a device yet."""

    name: str  # for people and metadata: the hub id, or the name of the file or folder
    path: Path  # the folder or file that was opened
    parts: Mapping[str, Part]  # "unet", "vae", "text_encoder"
    tokenizer: Path | None  # None: the one that comes with us
    scheduler_config: Mapping[str, Any]
    prediction_type: str
    prediction_told: bool  # whether the base or the preset said it; otherwise it is assumed
    clip_skip: int
    vae_id: str  # for caches of latents: changes with the VAE's weights and config
    text_id: str  # for caches of text embeddings: and with tokenizer and clip_skip
    denoiser_id: str  # for caches of the base's own images: and with prediction type and schedule
    model_hash: str  # A1111's short hash of a single file, else ""
    tokenizer_2: Path | None = None  # of a second text encoder
    variant: str = ""  # which of a family's models, where files call them apart: "schnell", "klein-4b"
    distilled: bool = False  # a model that draws in few steps and trains badly
    notes: tuple[str, ...] = field(default=())  # worth telling the user

    @property
    def params(self) -> dict[str, int]:
        """Weights of each part."""
        return {name: part.params for name, part in self.parts.items()}

    @property
    def file_bytes(self) -> dict[str, int]:
        """Size on disk of each part."""
        return {name: part.bytes for name, part in self.parts.items()}


def quantised_id(part_id: str, quantize: str) -> str:
    """The id of a part for caches when its weights are quantised: what it makes is another's."""
    return part_id if quantize == "none" else f"{part_id}-{quantize}"


def short_hash(file: Path) -> str:
    """The 8 hex digits by which A1111 long named a single-file model: SHA-256 of 64 KiB at 1 MiB."""
    with file.open("rb") as stream:
        stream.seek(0x100000)
        return hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]


def decide_prediction(
    scheduler_config: Mapping[str, Any] | None, markers: Mapping[str, Any], metadata: Mapping[str, str], chosen: str
) -> tuple[str, bool, list[str]]:
    """Prediction type, whether anything told it, and notes.

    In this order: the folder's scheduler config; a tensor called `v_pred` or `ztsnr` among `markers`; modelspec's
    `prediction_type` in `metadata`; `chosen` (model.prediction); else epsilon, with a note.
    """
    told, by = "", ""
    spec = metadata.get("modelspec.prediction_type", "").lower()
    if scheduler_config is not None:
        told, by = scheduler_config.get("prediction_type", "epsilon"), "its scheduler_config.json"
    elif "v_pred" in markers or "ztsnr" in markers:
        told, by = "v_prediction", "a key in the file"
    elif spec:
        told, by = ("v_prediction" if spec.startswith("v") else "epsilon"), "the file's modelspec metadata"
    if told:
        clash = chosen not in ("auto", told)
        note = f"the base predicts {told}, as {by} says: model.prediction = {chosen} is not used"
        return told, True, [note] if clash else []
    if chosen != "auto":
        return chosen, True, []
    return (
        "epsilon",
        False,
        [
            "nothing in the base says what it predicts: epsilon is assumed. If its pictures come "
            'out wrong, set model.prediction = "v_prediction"'
        ],
    )
