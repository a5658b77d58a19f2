"""What Flux.1 and Flux.2 share: a transformer of rectified flow, opened from folders, whole files and split files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from trainer.adapters.target import Target
from trainer.data.buckets import step_for
from trainer.errors import UserError
from trainer.families import bfl, ldm
from trainer.families.base import Base, short_hash
from trainer.families.opening import Opened, vae_part
from trainer.families.tensors import Header, Keep, Part, fill, fingerprint, without_prefix
from trainer.families.unet import set_gradient_checkpointing as set_gradient_checkpointing

EXPORT_DTYPE = "bf16"
DENOISER = "transformer"  # its name among the base's parts, and at the beginning of its layers' names
TEXT_DTYPE = torch.bfloat16  # of text encoders while captions are encoded: what the models were trained on
VAE_PREFIXES = ("vae.", ldm.VAE_PREFIX)


def part_of_file(header: Header, template: Mapping[str, Any]) -> Part:
    """The transformer of a single file, with or without ComfyUI's prefix, in its authors' or in diffusers' names."""
    names = without_prefix(header.tensors, bfl.PREFIX) or header.tensors
    layout = "bfl" if "img_in.weight" in names else "diffusers"
    try:
        return Part(header.file, bfl.transformer_config(names, layout, template), names, layout)
    except (KeyError, RuntimeError):
        raise UserError(f"{header.file} has no complete transformer: the file is damaged. Download it again") from None


def vae_of_file(header: Header, template: Mapping[str, Any]) -> Part | None:
    """The VAE that an all-in-one file keeps; None: it has none."""
    for prefix in VAE_PREFIXES:
        if found := without_prefix(header.tensors, prefix):
            return vae_part(header.file, found, template)
    return None


def describe(opened: Opened, tokenizers: Sequence[Path | None], extra: bytes, **facts: Any) -> Base:
    """The base that these parts make; `extra` is what else changes the text embeddings."""
    parts = opened.parts
    files = [file for folder in tokenizers if folder for file in sorted(folder.iterdir()) if file.is_file()]
    second = [fingerprint(part).encode() for name, part in parts.items() if name == "text_encoder_2"]
    return Base(
        name=opened.name,
        path=opened.path,
        parts=parts,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[-1],
        scheduler_config={},
        prediction_type="flow",
        prediction_told=True,
        clip_skip=1,
        vae_id=fingerprint(parts["vae"]),
        text_id=fingerprint(parts["text_encoder"], [*second, *(file.read_bytes() for file in files), extra]),
        denoiser_id=fingerprint(parts["transformer"]),
        model_hash=short_hash(opened.path) if opened.path.is_file() else "",
        **facts,
    )


def check_tokenizer(folder: Path | None, setting: str) -> None:
    """Raise UserError for a chosen tokenizer folder that is not there."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"there is no folder {folder}: {setting} must be a tokenizer folder")


def load(kind: type[nn.Module], base: Base, device: torch.device | str, dtype: torch.dtype,
         quantize: str = "none", keep: Keep | None = None) -> nn.Module:
    """The transformer of class `kind` on `device`, its blocks quantised. Raises UserError for damaged weights."""
    part = base.parts["transformer"]
    with init_empty_weights(include_buffers=False):
        transformer = kind.from_config(part.config)
    return fill(transformer, bfl.transformer_tensors(part), device, dtype, part.source, quantize, keep)


def bucket_step(resolution: int) -> int:
    """Pixels by which bucket sides differ: 64, and less for small pictures; a token is 16 pixels wide."""
    return step_for(resolution, 16)


def pack(latents: Tensor) -> Tensor:
    """b c h w -> b (h/2) (w/2) patches as channels: b 4c h/2 w/2, a channel's four pixels together."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def unpack(latents: Tensor) -> Tensor:
    """b 4c h w -> b c 2h 2w: undoes `pack`."""
    b, c, h, w = latents.shape
    return latents.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def guidance_of(denoiser: nn.Module, conditioning: Mapping[str, Tensor], like: Tensor) -> Tensor | None:
    """The guidance to embed (b): the sampler's, and 1, guidance off, in training; None for a model without."""
    if not denoiser.config.guidance_embeds:
        return None
    return conditioning.get("guidance", like.new_ones(len(like))).to(like.device, like.dtype)


# Where adapters go.

_JOINT = {  # of a double block's attention: name of the stacked rows, and its linears
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": ("attn.to_out.0",),
    "attn.to_add_out": ("attn.to_add_out",),
}
_FEED_FORWARD = re.compile(r"(ff|ff_context)\.(net\.0\.proj|net\.2|linear_in|linear_out)")


def targets_of(name: str, block: nn.Module, rows: Mapping[str, Sequence[str]], word: str, fuse: bool) -> list[Target]:
    """One target for each of `rows` (name -> linears of the block), or one for each linear when `fuse` is off."""
    found = []
    for stacked, paths in rows.items():
        if fuse and len(paths) > 1:
            parts = tuple(block.get_submodule(path) for path in paths)
            found.append(Target(f"{name}.{stacked}", parts[0], word, parts))
        else:
            found += [Target(f"{name}.{path}", block.get_submodule(path), word) for path in paths]
    return found


def double_targets(transformer: nn.Module, groups: Collection[str], fuse: bool) -> list[Target]:
    """The layers of the double blocks that the groups of adapter.targets ask for."""
    found = []
    for number, block in enumerate(transformer.transformer_blocks):
        name = f"transformer.transformer_blocks.{number}"
        if groups & {"attention", "all"}:
            found += targets_of(name, block, _JOINT, "double.attn", fuse)
        if groups & {"feed_forward", "all"}:
            paths = [path for path, _ in block.named_modules() if _FEED_FORWARD.fullmatch(path)]
            found += targets_of(name, block, {path: [path] for path in paths}, "double.ff", fuse)
    return found
