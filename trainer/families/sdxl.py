"""SDXL: a UNet conditioned on two CLIPs and on its picture's framing, in the latents of a KL autoencoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from trainer.adapters.target import Target
from trainer.families import clip_pair, clip_text, ldm, parts, unet
from trainer.families.base import Base
from trainer.families.clip_pair import ClipPair
from trainer.families.clip_text import ClipTextEncoder
from trainer.families.folders import read_json
from trainer.families.opening import Opened, given, open_parts, unet_part, vae_part
from trainer.families.tensors import Header, Part, without_prefix
from trainer.families.unet import DENOISER as DENOISER
from trainer.families.unet import EXPORT_DTYPE as EXPORT_DTYPE
from trainer.families.unet import TEXT_DTYPE as TEXT_DTYPE
from trainer.families.unet import VAE_FACTOR
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
    "vae": "SDXL's VAE (such as sdxl_vae.safetensors)",
    "text_encoder": "CLIP-L (such as clip_l.safetensors)",
    "text_encoder_2": "CLIP bigG (such as clip_g.safetensors)",
}
_FRAMING = 6  # numbers that say how a picture lies in its image
_CONFIGS = Path(__file__).parent / "configs" / "sdxl"


# Opening: headers only, no weights.


def open_base(
    base: str,
    *,
    vae: str = "",
    text_encoder: str = "",
    text_encoder_2: str = "",
    tokenizer: str = "",
    tokenizer_2: str = "",
    prediction: str = "auto",
    clip_skip: int = 1,
) -> Base:
    """Find a base model's parts: a diffusers folder, a single .safetensors file or a hub id; see `sd15.open_base`.

    clip_skip counts from SDXL's own layer, the one before the last. Raises UserError as there.
    """
    others = given({
        "vae": (vae, lambda path: parts.vae(path, _template("vae"))),
        "text_encoder": (text_encoder, lambda path: clip_text.other_part(
            path, "text_encoder", clip_pair.PREFIXES, _template("text_encoder"))),
        "text_encoder_2": (text_encoder_2, lambda path: clip_pair.other_second_part(
            path, _template("text_encoder_2"))),
    })
    opened = open_parts(base, "sdxl", PARTS, _parts_of_file, others)
    first, second = opened.parts["text_encoder"], opened.parts["text_encoder_2"]
    folders = [opened.tokenizer(tokenizer, "tokenizer"), opened.tokenizer(tokenizer_2, "tokenizer_2")]
    _check_widths(opened)
    parts.check_vae(opened.parts["vae"], unet.LATENT_CHANNELS)
    for part, folder, setting in zip((first, second), folders, ("model.tokenizer", "model.tokenizer_2")):
        unet.check_clip(part, folder, clip_skip, clip_text.VOCAB_SIZE, setting)
    return unet.describe(opened, folders, _template("scheduler"), prediction, clip_skip)


def _check_widths(opened: Opened) -> None:
    """The second encoder's width stands with its pooled state in the UNet's config; the first's is the rest."""
    config, whom = opened.parts["unet"].config, f"the UNet of {opened.path}"
    added, each = (config.get(key) or 0 for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
    second = added - _FRAMING * each
    for name, width in (("text_encoder_2", second), ("text_encoder", config.get("cross_attention_dim", 0) - second)):
        part = opened.parts[name]
        parts.check_text(part, name, clip_text.size(part), ("clip", width), whom)


def _template(part: str) -> dict[str, Any]:
    return read_json(_CONFIGS / f"{part}.json")


def _parts_of_file(header: Header) -> dict[str, Part]:
    tensors = header.tensors
    names = without_prefix(tensors, ldm.UNET_PREFIX) or tensors  # ComfyUI keeps UNets alone without the prefix
    found = {"unet": unet_part(header.file, names, _template("unet"))}
    if vae := without_prefix(tensors, ldm.VAE_PREFIX):
        found["vae"] = vae_part(header.file, vae, _template("vae"))
    if first := clip_text.part_of(header.file, tensors, clip_pair.PREFIXES, _template("text_encoder")):
        found["text_encoder"] = first
    if second := clip_pair.second_part_of(header.file, tensors, _template("text_encoder_2")):
        found["text_encoder_2"] = second
    return found


# Loading: one part after the other, each frozen and in eval mode.


def load_text_encoder(base: Base, device: torch.device | str, dtype: torch.dtype,
                      quantize: str = "none") -> ClipPair:
    """Both CLIPs on `device`, their layers quantised, with their tokenizers. Raises UserError for damaged weights or
    tokenizer."""
    first = clip_text.load(base.parts["text_encoder"], base.tokenizer, device, dtype, quantize=quantize)
    second = clip_text.load(base.parts["text_encoder_2"], base.tokenizer_2, device, dtype,
                            "CLIPTextModelWithProjection", pad="!", quantize=quantize)
    return ClipPair(ClipTextEncoder(*first, base.clip_skip), ClipTextEncoder(*second, base.clip_skip)).eval()


# Running.


def encode_prompts(text_encoder: ClipPair, prompts: Sequence[str]) -> dict[str, Tensor]:
    """{"prompt_embeds": b n d, "pooled": b d} with n = 77 a chunk; see ClipPair."""
    return text_encoder(prompts)


def prompt_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a short prompt's embeddings, without the batch, for a UNet of this config."""
    framing = _FRAMING * config["addition_time_embed_dim"]
    return {"prompt_embeds": (clip_text.PLACES, config["cross_attention_dim"]),
            "pooled": (config["projection_class_embeddings_input_dim"] - framing,)}


def prompt_chunks(text_encoder: ClipPair, prompt: str) -> int:
    """How many chunks of 77 tokens a prompt takes: prompts of equal chunks encode alike alone and together."""
    return len(text_encoder.first.chunks(prompt))


def predict(
    denoiser: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """The UNet's ε or v (b c h w, in the UNet's dtype) for noisy latents b c h w and timesteps b.

    `conditioning["framing"]` (b 6) holds original height and width, top and left of the crop, and target height and
    width (Podell et al. 2307.01952, §2.2); without it the picture counts as whole and made at its size.
    """
    dtype = denoiser.conv_in.weight.dtype
    framing = conditioning.get("framing")
    if framing is None:
        height, width = (side * VAE_FACTOR for side in noisy.shape[-2:])
        framing = noisy.new_tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(len(noisy), 6)
    added = {"text_embeds": conditioning["pooled"].to(dtype), "time_ids": framing}
    return denoiser(noisy.to(dtype), timesteps, conditioning["prompt_embeds"].to(dtype), added_cond_kwargs=added,
                    return_dict=False)[0]


# Where adapters go.


def adapter_targets(models: Mapping[str, nn.Module], groups: Collection[str]) -> list[Target]:
    """The layers of the chosen groups of adapter.targets; see `sd15.adapter_targets`. Both CLIPs are a group."""
    targets = unet.unet_targets(models["unet"], groups) if "unet" in models else []
    if "text_encoder" in groups:
        targets += unet.clip_targets("text_encoder", models["text_encoder"].first.body)
        targets += unet.clip_targets("text_encoder_2", models["text_encoder"].second.body)
    return targets
