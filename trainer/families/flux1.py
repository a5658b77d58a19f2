"""Flux.1 dev and schnell: a transformer of rectified flow on T5's hidden states and CLIP's pooled one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from trainer.adapters.target import Target
from trainer.families import clip_text, parts, t5_text, transformer, unet
from trainer.families.base import Base
from trainer.families.clip_text import ClipTextEncoder
from trainer.families.folders import read_json
from trainer.families.opening import Opened, given, open_parts
from trainer.families.tensors import Header, Keep, Part
from trainer.families.transformer import DENOISER as DENOISER
from trainer.families.transformer import EXPORT_DTYPE as EXPORT_DTYPE
from trainer.families.transformer import TEXT_DTYPE as TEXT_DTYPE
from trainer.families.transformer import bucket_step as bucket_step
from trainer.families.transformer import set_gradient_checkpointing as set_gradient_checkpointing
from trainer.families.unet import decode_latents as decode_latents
from trainer.families.unet import encode_images as encode_images
from trainer.families.unet import load_vae as load_vae
from trainer.flow import FlowObjective

LATENT_CHANNELS = 16
VAE_FACTOR = 8
T5_PLACES = {True: 512, False: 256}  # dev, schnell
PARTS = {  # what a base is made of, and what to give where a file lacks one
    "transformer": "",
    "vae": "Flux.1's VAE (such as ae.safetensors)",
    "text_encoder": "CLIP-L (such as clip_l.safetensors)",
    "text_encoder_2": "T5-XXL (such as t5xxl_fp16.safetensors)",
}
_CONFIGS = Path(__file__).parent / "configs" / "flux1"
_SINGLE = {"attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}
_SINGLE_WITH_MLP = {"attn.to_qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "proj_out": ("proj_out",)}


def latent_shape(width: int, height: int) -> tuple[int, int, int]:
    """Latents c h w of a picture of so many pixels."""
    return LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR


# Opening: headers only, no weights.


def open_base(
    base: str,
    *,
    vae: str = "",
    text_encoder: str = "",
    text_encoder_2: str = "",
    tokenizer: str = "",
    tokenizer_2: str = "",
) -> Base:
    """Find a base model's parts: a diffusers folder, a hub id, one file, or ComfyUI's split files.

    `base` may be the transformer alone, with `vae`, `text_encoder` (CLIP-L), `text_encoder_2` (T5) and `tokenizer_2`
    given apart. Raises UserError, naming the file, for whatever is missing, damaged or of another kind.
    """
    others = given({
        "vae": (vae, lambda path: parts.vae(path, _template("vae"))),
        "text_encoder": (text_encoder, lambda path: clip_text.other_part(
            path, "text_encoder", clip_text.PREFIXES, _template("text_encoder"))),
        "text_encoder_2": (text_encoder_2, lambda path: t5_text.other_part(path, _template("text_encoder_2"))),
    })
    opened = open_parts(base, "flux1", PARTS, _parts_of_file, others)
    _check_widths(opened)
    first, second = opened.tokenizer(tokenizer, "tokenizer"), opened.tokenizer(tokenizer_2, "tokenizer_2")
    unet.check_clip(opened.parts["text_encoder"], first, 1, clip_text.VOCAB_SIZE, "model.tokenizer")
    t5_text.check_tokenizer(second)
    dev = opened.parts["transformer"].config["guidance_embeds"]
    notes = () if dev else ("this is Flux.1 schnell, which is distilled to draw in four steps: training wears that "
                            "off. Flux.1 dev is the better base for a LoRA",)
    return transformer.describe(opened, [first, second], str(T5_PLACES[dev]).encode(), notes=notes,
                                variant="" if dev else "schnell")


def _template(part: str) -> dict[str, Any]:
    return read_json(_CONFIGS / f"{part}.json")


def _parts_of_file(header: Header) -> dict[str, Part]:
    found = {
        "transformer": transformer.part_of_file(header, _template("transformer")),
        "vae": transformer.vae_of_file(header, _template("vae")),
        "text_encoder": clip_text.part_of(header.file, header.tensors, clip_text.PREFIXES, _template("text_encoder")),
        "text_encoder_2": t5_text.part_of(header.file, header.tensors, _template("text_encoder_2")),
    }
    return {name: part for name, part in found.items() if part is not None}


def _check_widths(opened: Opened) -> None:
    config, whom = opened.parts["transformer"].config, f"the transformer of {opened.path}"
    clip, t5 = opened.parts["text_encoder"], opened.parts["text_encoder_2"]
    parts.check_text(clip, "text_encoder", clip_text.size(clip), ("clip", config["pooled_projection_dim"]), whom)
    parts.check_text(t5, "text_encoder_2", ("t5", t5.config.get("d_model", 0)), ("t5", config["joint_attention_dim"]),
                     whom)
    parts.check_vae(opened.parts["vae"], config["in_channels"] // 4)


# Loading: one part after the other, each frozen and in eval mode.


class TextEncoder(nn.Module):
    """CLIP-L for the pooled state, T5 for the sequence."""

    def __init__(self, clip: ClipTextEncoder, t5: t5_text.T5Text) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5


def load_text_encoder(base: Base, device: torch.device | str, dtype: torch.dtype,
                      quantize: str = "none") -> TextEncoder:
    """CLIP and T5 (this one quantised) with their tokenizers on `device`. Raises UserError for damaged weights or a
    missing tokenizer."""
    clip = ClipTextEncoder(*clip_text.load(base.parts["text_encoder"], base.tokenizer, device, dtype))
    places = T5_PLACES[base.parts["transformer"].config["guidance_embeds"]]
    t5 = t5_text.load(base.parts["text_encoder_2"], base.tokenizer_2, places, device, dtype, quantize)
    return TextEncoder(clip, t5).eval()


def load_denoiser(base: Base, device: torch.device | str, dtype: torch.dtype,
                  quantize: str = "none", keep: Keep | None = None) -> FluxTransformer2DModel:
    """The transformer on `device`, its blocks quantised. Raises UserError for damaged weights."""
    return transformer.load(FluxTransformer2DModel, base, device, dtype, quantize, keep)


# Running.


def encode_prompts(text_encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """{"prompt_embeds": b n d, "pooled": b d}: T5's hidden states, and CLIP's pooled one of the first 77 tokens."""
    clip = text_encoder.clip
    pooled = clip.model(clip.ids(prompts)[:, 0]).pooler_output
    return {"prompt_embeds": text_encoder.t5(prompts), "pooled": pooled}


def prompt_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a short prompt's embeddings, without the batch, for a transformer of this config."""
    return {"prompt_embeds": (T5_PLACES[config["guidance_embeds"]], config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],)}


def prompt_chunks(text_encoder: TextEncoder, prompt: str) -> int:
    """How many times T5's places a prompt takes: prompts of equal chunks encode alike alone and together."""
    return text_encoder.t5.chunks(prompt)


def predict(
    denoiser: FluxTransformer2DModel, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """The velocity (b c h w, in the transformer's dtype) for noisy latents b c h w and timesteps b in [0, 1000]."""
    dtype, embeds = denoiser.x_embedder.weight.dtype, conditioning["prompt_embeds"]
    packed = transformer.pack(noisy.to(dtype))  # b 4c h/2 w/2
    h, w = packed.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(h, device=noisy.device), torch.arange(w, device=noisy.device),
                                   indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(dtype)
    velocity = denoiser(
        packed.flatten(2).mT, embeds.to(dtype), conditioning["pooled"].to(dtype), timesteps.to(dtype) / 1000,
        image_ids, image_ids.new_zeros(embeds.shape[1], 3), transformer.guidance_of(denoiser, conditioning, packed),
        return_dict=False)[0]
    return transformer.unpack(velocity.mT.unflatten(2, (h, w)))


def objective(base: Base) -> FlowObjective:
    """Rectified flow; dev embeds its guidance and shifts by resolution, schnell has neither."""
    dev = base.parts["transformer"].config["guidance_embeds"]
    return FlowObjective("embedded" if dev else "none", "linear" if dev else "none", patch=2)


# Where adapters go.


def adapter_targets(models: Mapping[str, nn.Module], groups: Collection[str], fuse: bool = True) -> list[Target]:
    """The layers of the chosen groups of adapter.targets, in the model's order; q, k and v stacked when `fuse` is on.

    A single block's mlp stands beside its q, k and v on one input: stacked with them when all of it is trained.
    """
    model, groups = models["transformer"], set(groups)
    found = transformer.double_targets(model, groups, fuse)
    whole = bool(groups & {"single_blocks", "all"}) or {"attention", "feed_forward"} <= groups
    rows = _SINGLE_WITH_MLP if whole else _SINGLE if "attention" in groups else {}
    rows = rows or ({"proj_mlp": ("proj_mlp",)} if "feed_forward" in groups else {})
    for number, block in enumerate(model.single_transformer_blocks):
        found += transformer.targets_of(f"transformer.single_transformer_blocks.{number}", block, rows, "single", fuse)
    return found
