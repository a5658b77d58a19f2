"""What SD 1.5 and SDXL share: a UNet in the latents of a KL autoencoder, on a DDPM's noise schedule."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.adapters.target import Target
from trainer.data.buckets import step_for
from trainer.errors import UserError
from trainer.families import ldm
from trainer.families.base import Base, decide_prediction, short_hash
from trainer.families.clip_text import canonical
from trainer.families.opening import Opened
from trainer.families.tensors import Keep, Part, fill, fingerprint
from trainer.objective import Objective

VAE_FACTOR = 8  # pixels a latent
LATENT_CHANNELS = 4
EXPORT_DTYPE = "fp16"
DENOISER = "unet"  # its name among the base's parts, and at the beginning of its layers' names

TEXT_DTYPE = torch.float32  # of text encoders while captions are encoded: they are small

_UNET_LAYERS = {  # end of a module's path: group in adapter.targets
    re.compile(r".*\.(attn[12])\.to_(?:q|k|v|out\.0)"): "attention",
    re.compile(r".*\.(ff)\.net\.(?:0\.proj|2)"): "feed_forward",
    re.compile(r".*\.(proj)_(?:in|out)"): "projection",
    re.compile(r".*\.(conv)(?:[12]|_shortcut)?"): "convolution",  # of resnets, down- and upsamplers
}
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.(?:[qkv]_proj|out_proj|fc[12])")


def bucket_step(resolution: int) -> int:
    """Pixels by which bucket sides differ: 64, the UNet's coarsest grid, and less for small pictures."""
    return step_for(resolution, VAE_FACTOR)


def latent_shape(width: int, height: int) -> tuple[int, int, int]:
    """Latents c h w of a picture of so many pixels."""
    return LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR


# Opening: headers only, no weights.


def check_clip(part: Part, tokenizer: Path | None, clip_skip: int, vocab_size: int, setting: str) -> None:
    """Raise UserError unless a CLIP text encoder goes with its tokenizer and has the layer that is asked for."""
    text = part.config
    if tokenizer is None and text["vocab_size"] != vocab_size:
        raise UserError(
            f"the text encoder of {part.source} has a vocabulary of its own "
            f"({text['vocab_size']} tokens): give its tokenizer's folder as {setting}"
        )
    if tokenizer is not None and not tokenizer.is_dir():
        raise UserError(f"there is no folder {tokenizer}: {setting} must be a tokenizer folder")
    if clip_skip > text["num_hidden_layers"]:
        raise UserError(f"model.clip_skip = {clip_skip}, and the text encoder has {text['num_hidden_layers']} layers")


def describe(opened: Opened, tokenizers: Sequence[Path | None], template: Mapping[str, Any], prediction: str,
             clip_skip: int) -> Base:
    """The base that these parts make; `template` is the scheduler's config where the base has none."""
    header, parts = opened.header, opened.parts
    markers, metadata = (header.tensors, header.metadata) if header else ({}, {})
    prediction_type, told, notes = decide_prediction(opened.scheduler, markers, metadata, prediction)
    schedule = dict(opened.scheduler or template) | {"prediction_type": prediction_type}
    if "ztsnr" in markers:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    text = [fingerprint(part).encode() for name, part in parts.items() if name == "text_encoder_2"]
    files = [file for folder in tokenizers if folder for file in sorted(folder.iterdir()) if file.is_file()]
    text_extra = [*text, *(file.read_bytes() for file in files), str(clip_skip).encode()]
    return Base(
        name=opened.name,
        path=opened.path,
        parts=parts,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[-1],
        scheduler_config=schedule,
        prediction_type=prediction_type,
        prediction_told=told,
        clip_skip=clip_skip,
        vae_id=fingerprint(parts["vae"]),
        text_id=fingerprint(parts["text_encoder"], text_extra),
        denoiser_id=fingerprint(parts["unet"], [json.dumps(schedule, sort_keys=True).encode()]),
        model_hash=short_hash(opened.path) if opened.path.is_file() else "",
        notes=tuple(notes),
    )


# Loading: one part after the other, each frozen and in eval mode.


def load_vae(base: Base, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE on `device`, in fp32 where fp16 is asked for: some VAEs, SDXL's above all, overflow in fp16."""
    part = base.parts["vae"]
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKL.from_config(part.config)
    return fill(vae, ldm.vae_tensors(part), device, torch.float32 if dtype == torch.float16 else dtype, part.source)


def load_denoiser(base: Base, device: torch.device | str, dtype: torch.dtype,
                  quantize: str = "none", keep: Keep | None = None) -> UNet2DConditionModel:
    """The UNet on `device`, the linears of its transformer blocks quantised. Raises UserError for damaged weights."""
    part = base.parts["unet"]
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel.from_config(part.config)
    return fill(unet, ldm.unet_tensors(part), device, dtype, part.source, quantize, keep)


def set_gradient_checkpointing(denoiser: ModelMixin, on: bool) -> None:
    """Recompute each transformer block (and resnet) in the backward pass, non-reentrant, to hold less memory.

    The state of the random numbers is kept for it only where an adapter, installed before, has dropout: a pass that
    reads the state cannot become a CUDA graph.
    """
    if on:
        random = any(getattr(module, "adapter_dropout", 0.0) for module in denoiser.modules())
        denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=random))
    else:
        denoiser.disable_gradient_checkpointing()


# Running.


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Scaled latents b c h/8 w/8 (the posterior's mean, fp32) of pixels b 3 h w in [-1, 1]."""
    mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures b h w 3 (uint8) of scaled latents b c h w, one at a time to hold little memory."""
    latents = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels = torch.cat([vae.decode(one.to(vae.device, vae.dtype)).sample for one in latents.split(1)])  # b 3 h w
    return to_bytes(pixels)


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels b 3 h w in [-1, 1] as pictures b h w 3 (uint8)."""
    return (pixels.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def objective(base: Base) -> Objective:
    """What the base was trained to predict, on its own noise schedule."""
    return Objective.from_config(base.scheduler_config, base.prediction_type)


# Where adapters go.


def unet_targets(unet: nn.Module, groups: Collection[str]) -> list[Target]:
    """The UNet's layers of the chosen groups of adapter.targets, in its order, by diffusers' paths."""
    targets = []
    for path, module in unet.named_modules():
        for pattern, group in _UNET_LAYERS.items():
            if ("all" in groups or group in groups) and (match := pattern.fullmatch(path)):
                targets.append(Target(f"unet.{path}", module, f"{path.split('_')[0]}.{match[1]}"))
    return targets


def clip_targets(name: str, body: nn.Module) -> list[Target]:
    """All linears of a CLIP's layers; the names have `text_model` whatever transformers' version."""
    targets = []
    for path, module in body.named_modules():
        if match := _TEXT_LAYER.fullmatch(canonical(path)):
            word = "attn" if match[1] == "self_attn" else "ff"
            targets.append(Target(f"{name}.{canonical(path)}", module, f"text.{word}"))
    return targets
