"""SDXL's text encoders, CLIP-L and OpenCLIP bigG, as one: their hidden states side by side, and bigG's pooled one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.families import clip_text, open_clip
from trainer.families.clip_text import ClipTextEncoder
from trainer.families.parts import text_part
from trainer.families.tensors import Part, TensorInfo, meta_tensors, without_prefix

PREFIXES = ("conditioner.embedders.0.transformer.", *clip_text.PREFIXES)
PREFIXES_2 = ("text_encoders.clip_g.transformer.", "clip_g.transformer.")
_OPEN_CLIP_PREFIXES = ("conditioner.embedders.1.model.", "")


class ClipPair(nn.Module):
    """Prompts in; prompt_embeds (b, 77 · chunks, d1 + d2) and pooled (b, d) of the first chunk out."""

    def __init__(self, first: ClipTextEncoder, second: ClipTextEncoder) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states = []
        for encoder in (self.first, self.second):
            out = encoder.model(encoder.ids(prompts).flatten(0, 1), output_hidden_states=True)
            hidden = out.hidden_states[-1 - encoder.clip_skip]  # b*k 77 d; SDXL takes no final norm
            states.append(hidden.reshape(len(prompts), -1, hidden.shape[-1]))
        pooled = out.text_embeds.reshape(len(prompts), -1, out.text_embeds.shape[-1])[:, 0]  # b d
        return {"prompt_embeds": torch.cat(states, -1), "pooled": pooled}


def second_part_of(file: Path, tensors: Mapping[str, TensorInfo], template: Mapping[str, Any]) -> Part | None:
    """The second encoder that a file keeps, in transformers' or OpenCLIP's names; None: it has none."""
    if part := clip_text.part_of(file, tensors, PREFIXES_2, template):
        return part
    for prefix in _OPEN_CLIP_PREFIXES:
        found = without_prefix(tensors, prefix)
        if "positional_embedding" in found and "text_projection" in found:
            names = open_clip.renamed(meta_tensors(found))
            shapes = {clip_text.canonical(name): tensor for name, tensor in names.items()}
            return Part(file, clip_text.text_config(shapes, template), found, "open_clip")
    return None


def other_second_part(path: Path, template: Mapping[str, Any]) -> Part:
    """A second encoder given apart from its base as model.text_encoder_2, a folder or a file."""

    def find(tensors: Mapping[str, TensorInfo]) -> Part | None:
        part = second_part_of(path, tensors, template) or clip_text.part_of(path, tensors, ("",), template)
        return part if part and "text_projection" in " ".join(part.tensors) else None

    return text_part(path, "text_encoder_2", ["clip"], "CLIP bigG", find)
