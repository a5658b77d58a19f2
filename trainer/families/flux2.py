"""Flux.2 klein (4B, 9B) and dev: a transformer of rectified flow on a language model's hidden states."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor, nn

from trainer.adapters.target import Target
from trainer.errors import UserError
from trainer.families import hub, ldm, llm_text, parts, transformer, unet
from trainer.families.base import Base
from trainer.families.folders import read_json
from trainer.families.llm_text import LlmText
from trainer.families.opening import Opened, given, open_parts
from trainer.families.recognise import klein_is_distilled
from trainer.families.tensors import Header, Keep, Part, fill
from trainer.families.transformer import DENOISER as DENOISER
from trainer.families.transformer import EXPORT_DTYPE as EXPORT_DTYPE
from trainer.families.transformer import TEXT_DTYPE as TEXT_DTYPE
from trainer.families.transformer import bucket_step as bucket_step
from trainer.families.transformer import set_gradient_checkpointing as set_gradient_checkpointing
from trainer.flow import FlowObjective

LATENT_FACTOR = 16  # pixels a latent: the VAE's 8, then 2 x 2 packed into channels

PARTS = {  # what a base is made of, and what to give where a file lacks one
    "transformer": "",
    "vae": "Flux.2's VAE (such as flux2-vae.safetensors)",
    "text_encoder": "its language model (klein 4B: Qwen3-4B, such as qwen_3_4b.safetensors; klein 9B: Qwen3-8B, "
                    "such as qwen_3_8b_fp8mixed.safetensors; dev: mistral_3_small_flux2_fp8.safetensors)",
}
_CONFIGS = Path(__file__).parent / "configs" / "flux2"
_SINGLE = {path: (path,) for path in ("attn.to_qkv_mlp_proj", "attn.to_out")}


def latent_shape(width: int, height: int) -> tuple[int, int, int]:
    """Latents c h w of a picture of so many pixels."""
    return 128, height // LATENT_FACTOR, width // LATENT_FACTOR


# Opening: headers only, no weights.


def open_base(base: str, *, vae: str = "", text_encoder: str = "", tokenizer: str = "",
              distilled: str = "auto") -> Base:
    """Find a base model's parts: a diffusers folder, a hub id, one file, or ComfyUI's split files.

    `base` may be the transformer alone, with `vae` and `text_encoder` given apart. `distilled` ("yes", "no") counts
    where the base does not say whether it is. Raises UserError, naming the file, for whatever is missing, damaged or
    of another kind.
    """
    others = given({
        "vae": (vae, lambda path: parts.vae(path, _template("vae"))),
        "text_encoder": (text_encoder, lambda path: llm_text.other_part(path, _template)),
    })
    opened = open_parts(base, "flux2", PARTS, _parts_of_file, others)
    _check_widths(opened)
    folder = opened.tokenizer(tokenizer, "tokenizer")
    text = opened.parts["text_encoder"]
    transformer.check_tokenizer(folder, "model.tokenizer")
    if folder is None and llm_text.kind_of(text) != "qwen3":
        llm_text.load_tokenizer(None, "mistral")
    vocabulary = llm_text.body_config(text)["vocab_size"]
    if folder is None and vocabulary not in llm_text.QWEN_VOCABULARY:
        raise UserError(f"the text encoder of {text.source} has a vocabulary of its own ({vocabulary} tokens): give "
                        "its tokenizer's folder as model.tokenizer")
    told, notes = decide_distilled(opened, distilled)
    return transformer.describe(opened, [folder], b"", distilled=told, notes=notes,
                                variant=variant_of(opened.parts["transformer"].config))


def variant_of(config: Mapping[str, Any]) -> str:
    """Which Flux.2 a transformer is: "klein-4b", "klein-9b", "klein" of another size, or "" for dev."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return "" if config["guidance_embeds"] else {3072: "klein-4b", 4096: "klein-9b"}.get(width, "klein")


def decide_distilled(opened: Opened, chosen: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a klein is the distilled one, and notes: both have the same shapes.

    By model_index.json's `is_distilled`, the hub id, the file's metadata, its name, then model.distilled. Flux.2 dev,
    which embeds its guidance, is neither.
    """
    if opened.parts["transformer"].config["guidance_embeds"]:
        return False, ()
    index = opened.path / "model_index.json"
    told = read_json(index).get("is_distilled") if index.is_file() else None
    metadata = " ".join((opened.header.metadata if opened.header else {}).values())
    if told is None:
        told = klein_is_distilled(opened.base if hub.is_hub_id(opened.base) else "", metadata, opened.path.name)
    if told is None and chosen != "auto":
        told = chosen == "yes"
    if told is None:
        return False, ("nothing in this klein model says whether it is the base or the distilled one, which have the "
                       'same shapes: the base is assumed. Say it with model.distilled = "yes" or "no"',)
    clash = chosen not in ("auto", "yes" if told else "no")
    notes = [f"the model itself says that it is {'' if told else 'not '}distilled: model.distilled = {chosen} is not "
             "used"] if clash else []
    if told:
        notes.append("this klein model is distilled to draw in four steps without guidance: a LoRA trained on it "
                     "learns badly and wears that off. Train on the base (FLUX.2-klein-base-4B or -9B); its LoRA also "
                     "works on the distilled model")
    return bool(told), tuple(notes)


def _template(part: str) -> dict[str, Any]:
    return read_json(_CONFIGS / f"{part}.json")


def _parts_of_file(header: Header) -> dict[str, Part]:
    found = {
        "transformer": transformer.part_of_file(header, _template("transformer")),
        "vae": transformer.vae_of_file(header, _template("vae")),
        "text_encoder": llm_text.part_of(header.file, header.tensors, _template),
    }
    return {name: part for name, part in found.items() if part is not None}


def _check_widths(opened: Opened) -> None:
    """The text's three layers stand side by side; klein reads Qwen3, dev Mistral."""
    config, text = opened.parts["transformer"].config, opened.parts["text_encoder"]
    found = llm_text.kind_of(text), llm_text.body_config(text).get("hidden_size", 0)
    needed = "mistral" if config["guidance_embeds"] else "qwen3", config["joint_attention_dim"] // 3
    parts.check_text(text, "text_encoder", found, needed, f"the transformer of {opened.path}")
    parts.check_vae(opened.parts["vae"], config["in_channels"] // 4)


# Loading: one part after the other, each frozen and in eval mode.


def load_text_encoder(base: Base, device: torch.device | str, dtype: torch.dtype,
                      quantize: str = "none") -> LlmText:
    """Qwen3 or Mistral on `device`, its layers quantised, with its tokenizer. Raises UserError for damaged weights or
    tokenizer."""
    return llm_text.load(base.parts["text_encoder"], base.tokenizer, device, dtype, quantize)


def load_vae(base: Base, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKLFlux2:
    """The VAE with its latents' statistics on `device`, in fp32 where fp16 is asked for."""
    part = base.parts["vae"]
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKLFlux2.from_config(part.config)
    return fill(vae, ldm.vae_tensors(part), device, torch.float32 if dtype == torch.float16 else dtype, part.source)


def load_denoiser(base: Base, device: torch.device | str, dtype: torch.dtype,
                  quantize: str = "none", keep: Keep | None = None) -> Flux2Transformer2DModel:
    """The transformer on `device`, its blocks quantised. Raises UserError for damaged weights."""
    return transformer.load(Flux2Transformer2DModel, base, device, dtype, quantize, keep)


# Running.


def encode_prompts(text_encoder: LlmText, prompts: Sequence[str]) -> dict[str, Tensor]:
    """{"prompt_embeds": b n 3d}: three layers' hidden states side by side; see LlmText."""
    return {"prompt_embeds": text_encoder(prompts)}


def prompt_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a short prompt's embeddings, without the batch, for a transformer of this config."""
    return {"prompt_embeds": (llm_text.PLACES, config["joint_attention_dim"])}


def prompt_chunks(text_encoder: LlmText, prompt: str) -> int:
    """How many times 512 tokens a prompt takes: prompts of equal chunks encode alike alone and together."""
    return text_encoder.chunks(prompt)


def _statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Mean and deviation of packed latents, 1 c 1 1, in fp32."""
    mean, variance = (stat.float().view(1, -1, 1, 1) for stat in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def encode_images(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """Packed, normalised latents b 4c h/16 w/16 (of the posterior's mean, fp32) of pixels b 3 h w in [-1, 1]."""
    mean, deviation = _statistics(vae)
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    return (transformer.pack(latents) - mean) / deviation


def decode_latents(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """Pictures b h w 3 (uint8) of packed latents b 4c h w, one at a time to hold little memory."""
    mean, deviation = _statistics(vae)
    latents = transformer.unpack(latents.to(mean) * deviation + mean)
    return unet.to_bytes(torch.cat([vae.decode(one.to(vae.dtype)).sample for one in latents.split(1)]))


def predict(
    denoiser: Flux2Transformer2DModel, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """The velocity (b c h w, in the transformer's dtype) for noisy latents b c h w and timesteps b in [0, 1000]."""
    dtype, embeds, device = denoiser.x_embedder.weight.dtype, conditioning["prompt_embeds"], noisy.device
    h, w = noisy.shape[-2:]
    one = torch.zeros(1, dtype=torch.long, device=device)
    image_ids = torch.cartesian_prod(one, torch.arange(h, device=device), torch.arange(w, device=device), one)
    text_ids = torch.cartesian_prod(one, one, one, torch.arange(embeds.shape[1], device=device))  # n 4
    noisy = noisy.to(dtype)
    velocity = denoiser(noisy.flatten(2).mT, embeds.to(dtype), timesteps.to(dtype) / 1000, image_ids, text_ids,
                        transformer.guidance_of(denoiser, conditioning, noisy), return_dict=False)[0]
    return velocity.mT.unflatten(2, (h, w))


def objective(base: Base) -> FlowObjective:
    """Rectified flow; dev embeds its guidance, the base klein is guided with a negative prompt, the distilled not."""
    embedded = base.parts["transformer"].config["guidance_embeds"]
    guidance = "embedded" if embedded else "none" if base.distilled else "classifier_free"
    return FlowObjective(guidance, "empirical", patch=1)


# Where adapters go.


def adapter_targets(models: Mapping[str, nn.Module], groups: Collection[str], fuse: bool = True) -> list[Target]:
    """The layers of the chosen groups of adapter.targets, in the model's order; q, k and v stacked when `fuse` is on.

    A single block has one linear for q, k, v and mlp, and one for both outputs: they come with the attention.
    """
    model, groups = models["transformer"], set(groups)
    found = transformer.double_targets(model, groups, fuse)
    rows = _SINGLE if groups & {"attention", "single_blocks", "all"} else {}
    for number, block in enumerate(model.single_transformer_blocks):
        found += transformer.targets_of(f"transformer.single_transformer_blocks.{number}", block, rows, "single", fuse)
    return found
