"""SD 1.5: a UNet conditioned on CLIP-L by cross attention, in the latents of a KL autoencoder."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from trainer.adapters.target import Target
from trainer.errors import UserError
from trainer.families import clip_text, hub, ldm
from trainer.families.base import Base, decide_prediction, short_hash
from trainer.families.clip_text import ClipTextEncoder, canonical
from trainer.families.folders import component, read_json
from trainer.families.opening import locate, open_file, open_folder, unet_part, vae_from_file, vae_part
from trainer.families.tensors import Header, Part, TensorInfo, fill, fingerprint, read_header, without_prefix
from trainer.objective import Objective

VAE_FACTOR = 8  # pixels a latent
LATENT_CHANNELS = 4
EXPORT_DTYPE = "fp16"
# Peak bytes a pixel that one step holds beside weights, in 16 bits, without and with gradient checkpointing: the
# allocator's peak at 512 px, attention adapters of rank 16, attention without its matrix (CPU, torch 2.13).
ACTIVATION_BYTES = {False: 3200, True: 890}

_COMPONENTS = ("unet", "vae", "text_encoder")
_CONFIGS = Path(__file__).parent / "configs" / "sd15"
_UNET_LAYERS = {  # end of a module's path: group in adapter.targets
    re.compile(r".*\.(attn[12])\.to_(?:q|k|v|out\.0)"): "attention",
    re.compile(r".*\.(ff)\.net\.(?:0\.proj|2)"): "feed_forward",
    re.compile(r".*\.(proj)_(?:in|out)"): "projection",
}
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.(?:[qkv]_proj|out_proj|fc[12])")


def bucket_step(resolution: int) -> int:
    """Pixels by which bucket sides differ: 64, the UNet's coarsest grid, and less for small pictures."""
    return max(VAE_FACTOR, min(64, resolution // 64 * VAE_FACTOR))


def latent_shape(width: int, height: int) -> tuple[int, int, int]:
    """Latents c h w of a picture of so many pixels."""
    return LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR


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
    path = locate(base, _COMPONENTS)
    header, scheduler, tokenizer_folder = None, None, None
    if path.is_dir():
        parts = open_folder(
            path,
            "sd15",
            [
                name
                for name in _COMPONENTS
                if not (name == "vae" and vae) and not (name == "text_encoder" and text_encoder)
            ],
        )
        scheduler = read_json(path / "scheduler" / "scheduler_config.json")
        tokenizer_folder = path / "tokenizer" if (path / "tokenizer").is_dir() else None
    else:
        header = open_file(path, "sd15")
        parts = _parts_of_file(header)
    if vae:
        parts["vae"] = _other_vae(Path(vae))
    if text_encoder:
        parts["text_encoder"] = _other_text_encoder(Path(text_encoder))
    if tokenizer:
        tokenizer_folder = Path(tokenizer)
    _check_parts(path, parts, tokenizer_folder, clip_skip)
    name = base if hub.is_hub_id(base) else path.resolve().stem if path.is_file() else path.resolve().name
    return _described(name, path, parts, tokenizer_folder, header, scheduler, prediction, clip_skip)


def _described(
    name: str,
    path: Path,
    parts: dict[str, Part],
    tokenizer: Path | None,
    header: Header | None,
    scheduler: dict[str, Any] | None,
    prediction: str,
    clip_skip: int,
) -> Base:
    markers, metadata = (header.tensors, header.metadata) if header else ({}, {})
    prediction_type, told, notes = decide_prediction(scheduler, markers, metadata, prediction)
    schedule = dict(scheduler or _template("scheduler")) | {"prediction_type": prediction_type}
    if "ztsnr" in markers:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    tokenizer_files = sorted(tokenizer.iterdir()) if tokenizer else []
    text_extra = [file.read_bytes() for file in tokenizer_files if file.is_file()] + [str(clip_skip).encode()]
    return Base(
        name=name,
        path=path,
        parts=parts,
        tokenizer=tokenizer,
        scheduler_config=schedule,
        prediction_type=prediction_type,
        prediction_told=told,
        clip_skip=clip_skip,
        vae_id=fingerprint(parts["vae"]),
        text_id=fingerprint(parts["text_encoder"], text_extra),
        denoiser_id=fingerprint(parts["unet"], [json.dumps(schedule, sort_keys=True).encode()]),
        model_hash=short_hash(path) if path.is_file() else "",
        notes=tuple(notes),
    )


def _template(part: str) -> dict[str, Any]:
    return read_json(_CONFIGS / f"{part}.json")


def _parts_of_file(header: Header) -> dict[str, Part]:
    tensors = header.tensors
    unet = without_prefix(tensors, ldm.UNET_PREFIX) or tensors  # ComfyUI keeps UNets alone without the prefix
    parts = {"unet": unet_part(header.file, unet, _template("unet"))}
    if vae := without_prefix(tensors, ldm.VAE_PREFIX):
        parts["vae"] = vae_part(header.file, vae, _template("vae"))
    if text := _text_part(header.file, tensors, clip_text.PREFIXES):
        parts["text_encoder"] = text
    return parts


def _text_part(file: Path, tensors: Mapping[str, TensorInfo], prefixes: Sequence[str]) -> Part | None:
    for prefix in prefixes:
        found = {
            canonical(name): info
            for name, info in without_prefix(tensors, prefix).items()
            if name.removeprefix("text_model.").startswith(("embeddings.", "encoder.", "final_layer_norm."))
        }
        if "text_model.embeddings.token_embedding.weight" in found:
            return Part(file, clip_text.text_config(found, _template("text_encoder")), found, "ldm")
    return None


def _other_vae(path: Path) -> Part:
    if path.is_dir():
        return component(path / "vae" if (path / "vae").is_dir() else path)
    return vae_from_file(path, _template("vae"))


def _other_text_encoder(path: Path) -> Part:
    if path.is_dir():
        return component(path / "text_encoder" if (path / "text_encoder").is_dir() else path)
    part = _text_part(path, read_header(path).tensors, (*clip_text.PREFIXES, ""))
    if part is None:
        raise UserError(f"{path} has no CLIP text encoder: choose another model.text_encoder")
    return part


def _check_parts(path: Path, parts: Mapping[str, Part], tokenizer: Path | None, clip_skip: int) -> None:
    """Raise UserError unless all parts are there and fit together."""
    for name in _COMPONENTS:
        if name not in parts:
            raise UserError(f"{path} has no {name.replace('_', ' ')}: give one as model.{name}")
    text, unet, vae = parts["text_encoder"].config, parts["unet"].config, parts["vae"].config
    if text.get("hidden_size") != unet.get("cross_attention_dim"):
        raise UserError(
            f"the text encoder of {parts['text_encoder'].source} is {text.get('hidden_size')} wide, and "
            f"the UNet of {path} takes {unet.get('cross_attention_dim')}: they do not belong together"
        )
    if vae.get("latent_channels") != LATENT_CHANNELS:
        raise UserError(
            f"the VAE of {parts['vae'].source} has {vae.get('latent_channels')} latent channels instead "
            f"of {LATENT_CHANNELS}: it is for another kind of model"
        )
    if tokenizer is None and text["vocab_size"] != clip_text.VOCAB_SIZE:
        raise UserError(
            f"the text encoder of {parts['text_encoder'].source} has a vocabulary of its own "
            f"({text['vocab_size']} tokens): give its tokenizer's folder as model.tokenizer"
        )
    if tokenizer is not None and not tokenizer.is_dir():
        raise UserError(f"there is no folder {tokenizer}: model.tokenizer must be a tokenizer folder")
    if clip_skip > text["num_hidden_layers"]:
        raise UserError(f"model.clip_skip = {clip_skip}, and the text encoder has {text['num_hidden_layers']} layers")


# Loading: one part after the other, each frozen and in eval mode.


def load_text_encoder(base: Base, device: torch.device | str, dtype: torch.dtype) -> ClipTextEncoder:
    """CLIP with its tokenizer on `device`. Raises UserError for damaged weights or tokenizer."""
    tokenizer = clip_text.load_tokenizer(base.tokenizer)
    model = clip_text.load_text_model(base.parts["text_encoder"], device, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {base.tokenizer} has {len(tokenizer)} tokens and the text encoder "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return ClipTextEncoder(model, tokenizer, base.clip_skip).eval()


def load_vae(base: Base, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE on `device`, in fp32 where fp16 is asked for: some VAEs overflow in fp16."""
    part = base.parts["vae"]
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKL.from_config(part.config)
    return fill(vae, ldm.vae_tensors(part), device, torch.float32 if dtype == torch.float16 else dtype, part.source)


def load_denoiser(base: Base, device: torch.device | str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet on `device`. Raises UserError for damaged weights."""
    part = base.parts["unet"]
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel.from_config(part.config)
    return fill(unet, ldm.unet_tensors(part), device, dtype, part.source)


def set_gradient_checkpointing(denoiser: UNet2DConditionModel, on: bool) -> None:
    """Recompute blocks in the backward pass (non-reentrant), to hold less memory."""
    if on:
        denoiser.enable_gradient_checkpointing()
    else:
        denoiser.disable_gradient_checkpointing()


# Running.


def encode_prompts(text_encoder: ClipTextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """{"prompt_embeds": b n d} with n = 77 a chunk, in the encoder's dtype; see ClipTextEncoder for long prompts."""
    return {"prompt_embeds": text_encoder(prompts)}


def prompt_chunks(text_encoder: ClipTextEncoder, prompt: str) -> int:
    """How many chunks of 77 tokens a prompt takes: prompts of equal chunks encode alike alone and together."""
    return len(text_encoder.chunks(prompt))


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Scaled latents b c h/8 w/8 (the posterior's mean, fp32) of pixels b 3 h w in [-1, 1]."""
    mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures b h w 3 (uint8) of scaled latents b c h w, one at a time to hold little memory."""
    latents = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels = torch.cat([vae.decode(one.to(vae.device, vae.dtype)).sample for one in latents.split(1)])  # b 3 h w
    return (pixels.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def predict(
    denoiser: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """The UNet's ε or v (b c h w, in the UNet's dtype) for noisy latents b c h w and timesteps b."""
    dtype = denoiser.conv_in.weight.dtype
    return denoiser(noisy.to(dtype), timesteps, conditioning["prompt_embeds"].to(dtype), return_dict=False)[0]


def objective(base: Base) -> Objective:
    """What the base was trained to predict, on its own noise schedule."""
    return Objective.from_config(base.scheduler_config, base.prediction_type)


# Where adapters go.


def adapter_targets(models: Mapping[str, nn.Module], groups: Collection[str]) -> list[Target]:
    """The layers of the chosen groups of adapter.targets, in the models' order.

    `models` has "unet", and "text_encoder" when that group is chosen. Names are diffusers' paths after the model's
    key; those of CLIP have `text_model` whatever transformers' version.
    """
    targets = []
    for path, module in models["unet"].named_modules() if "unet" in models else []:
        for pattern, group in _UNET_LAYERS.items():
            if group in groups and (match := pattern.fullmatch(path)):
                targets.append(Target(f"unet.{path}", module, f"{path.split('_')[0]}.{match[1]}"))
    if "text_encoder" in groups:
        for path, module in models["text_encoder"].body.named_modules():
            if match := _TEXT_LAYER.fullmatch(canonical(path)):
                word = "attn" if match[1] == "self_attn" else "ff"
                targets.append(Target(f"text_encoder.{canonical(path)}", module, f"text.{word}"))
    return targets
