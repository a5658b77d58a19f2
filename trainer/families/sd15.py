"""SD 1.5: a UNet conditioned on CLIP-L by cross attention, in the latents of a KL autoencoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from trainer.adapters.target import Target
from trainer.families import clip_text, ldm, parts, unet
from trainer.families.base import Base
from trainer.families.clip_text import ClipTextEncoder
from trainer.families.folders import read_json
from trainer.families.opening import given, open_parts, unet_part, vae_part
from trainer.families.tensors import Header, Part, without_prefix
from trainer.families.unet import DENOISER as DENOISER
from trainer.families.unet import EXPORT_DTYPE as EXPORT_DTYPE
from trainer.families.unet import TEXT_DTYPE as TEXT_DTYPE
from trainer.families.unet import bucket_step as bucket_step
from trainer.families.unet import decode_latents as decode_latents
from trainer.families.unet import encode_images as encode_images
from trainer.families.unet import latent_shape as latent_shape
from trainer.families.unet import load_denoiser as load_denoiser
from trainer.families.unet import load_vae as load_vae
from trainer.families.unet import objective as objective
from trainer.families.unet import set_gradient_checkpointing as set_gradient_checkpointing

PARTS = {  # what a base is made of, and what to give where a file lacks one
    "unet": "",
    "vae": "SD 1.5's VAE (such as vae-ft-mse-840000-ema-pruned.safetensors)",
    "text_encoder": "CLIP-L (such as clip_l.safetensors)",
}
_CONFIGS = Path(__file__).parent / "configs" / "sd15"

# Opening: headers only, no weights.


def open_base(
    base: str,
    *,
    vae: str = "",
    text_encoder: str = "",
    tokenizer: str = "",
    prediction: str = "auto",
    clip_skip: int = 1,
) -> Base:
    """Find a base model's parts: a diffusers folder, a single .safetensors file or a hub id (downloaded when new).

    `vae`, `text_encoder` (folders or files) and `tokenizer` (a folder) replace the base's own; `prediction` counts
    where the base does not say. Raises UserError, naming the file, for whatever is missing, damaged or of another
    kind.
    """
    others = given({
        "vae": (vae, lambda path: parts.vae(path, _template("vae"))),
        "text_encoder": (text_encoder, lambda path: clip_text.other_part(
            path, "text_encoder", clip_text.PREFIXES, _template("text_encoder"))),
    })
    opened = open_parts(base, "sd15", PARTS, _parts_of_file, others)
    text, tokenizer_folder = opened.parts["text_encoder"], opened.tokenizer(tokenizer, "tokenizer")
    width = opened.parts["unet"].config.get("cross_attention_dim")
    parts.check_text(text, "text_encoder", clip_text.size(text), ("clip", width), f"the UNet of {opened.path}")
    parts.check_vae(opened.parts["vae"], unet.LATENT_CHANNELS)
    unet.check_clip(text, tokenizer_folder, clip_skip, clip_text.VOCAB_SIZE, "model.tokenizer")
    return unet.describe(opened, [tokenizer_folder], _template("scheduler"), prediction, clip_skip)


def _template(part: str) -> dict[str, Any]:
    return read_json(_CONFIGS / f"{part}.json")


def _parts_of_file(header: Header) -> dict[str, Part]:
    tensors = header.tensors
    names = without_prefix(tensors, ldm.UNET_PREFIX) or tensors  # ComfyUI keeps UNets alone without the prefix
    found = {"unet": unet_part(header.file, names, _template("unet"))}
    if vae := without_prefix(tensors, ldm.VAE_PREFIX):
        found["vae"] = vae_part(header.file, vae, _template("vae"))
    if text := clip_text.part_of(header.file, tensors, clip_text.PREFIXES, _template("text_encoder")):
        found["text_encoder"] = text
    return found


# Loading: one part after the other, each frozen and in eval mode.


def load_text_encoder(base: Base, device: torch.device | str, dtype: torch.dtype,
                      quantize: str = "none") -> ClipTextEncoder:
    """CLIP with its tokenizer on `device`, its layers quantised. Raises UserError for damaged weights or tokenizer."""
    model, tokenizer = clip_text.load(base.parts["text_encoder"], base.tokenizer, device, dtype, quantize=quantize)
    return ClipTextEncoder(model, tokenizer, base.clip_skip).eval()


# Running.


def encode_prompts(text_encoder: ClipTextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """{"prompt_embeds": b n d} with n = 77 a chunk, in the encoder's dtype; see ClipTextEncoder for long prompts."""
    return {"prompt_embeds": text_encoder(prompts)}


def prompt_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a short prompt's embeddings, without the batch, for a UNet of this config."""
    return {"prompt_embeds": (clip_text.PLACES, config["cross_attention_dim"])}


def prompt_chunks(text_encoder: ClipTextEncoder, prompt: str) -> int:
    """How many chunks of 77 tokens a prompt takes: prompts of equal chunks encode alike alone and together."""
    return len(text_encoder.chunks(prompt))


def predict(
    denoiser: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """The UNet's ε or v (b c h w, in the UNet's dtype) for noisy latents b c h w and timesteps b."""
    dtype = denoiser.conv_in.weight.dtype
    return denoiser(noisy.to(dtype), timesteps, conditioning["prompt_embeds"].to(dtype), return_dict=False)[0]


# Where adapters go.


def adapter_targets(models: Mapping[str, nn.Module], groups: Collection[str]) -> list[Target]:
    """The layers of the chosen groups of adapter.targets, in the models' order.

    `models` has "unet", and "text_encoder" when that group is chosen. Names are diffusers' paths after the model's
    key; those of CLIP have `text_model` whatever transformers' version.
    """
    targets = unet.unet_targets(models["unet"], groups) if "unet" in models else []
    if "text_encoder" in groups:
        targets += unet.clip_targets("text_encoder", models["text_encoder"].body)
    return targets
