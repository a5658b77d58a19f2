"""What a file of weights or a model folder is, told from names and shapes, so that a wrong one is named in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.families.header import TensorInfo

FAMILIES = ("sd15", "sdxl", "flux1", "flux2")
# Kinds that a base can be, in words. Families of ours have the family's name as their kind.
KINDS = {
    "sd15": "an SD 1.5 model",
    "sd15-edit": "an SD 1.5 model for inpainting or editing, whose UNet takes extra input channels",
    "sd2": "an SD 2 model",
    "sdxl": "an SDXL model",
    "sdxl-refiner": "the SDXL refiner",
    "sd3": "an SD 3 model",
    "flux1": "a Flux.1 model",
    "flux2": "a Flux.2 model",
    "chroma": "a Chroma model",
    "qwen-image": "a Qwen-Image model",
    "z-image": "a Z-Image model",
    "lcm": "a latent consistency model (distilled)",
    "lora": "a LoRA, not a base model",
    "quantised": "a model that was already quantised (bitsandbytes or SVDQuant)",
    "embedding": "a textual inversion embedding, not a base model",
    "controlnet": "a ControlNet, not a base model",
    "vae": "a VAE alone, not a base model",
    "text_encoder": "a text encoder alone, not a base model",
    "other": "no model that is known here",
}

_LORA_WORDS = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".lora.down.", ".hada_w1", ".lokr_w")
_TELLTALE = {  # part of a tensor's name, kind; the first that is found decides
    ".quant_state.": "quantised",
    ".qweight": "quantised",
    "double_stream_modulation": "flux2",
    "distilled_guidance_layer": "chroma",
    "joint_blocks.": "sd3",
    "double_blocks.": "flux1",
    "single_transformer_blocks.": "flux1",
    "transformer_blocks.0.img_mod": "qwen-image",
    "cap_embedder.": "z-image",
    "pos_embed.pos_embed": "sd3",
    "control_model.": "controlnet",
    "controlnet_cond_embedding.": "controlnet",
    "string_to_param": "embedding",
    "emb_params": "embedding",
}
_ENCODERS = {  # kind and width of a text encoder that the families use: its name
    ("clip", 768): "CLIP-L",
    ("clip", 1280): "CLIP bigG",
    ("t5", 4096): "T5-XXL",
    ("qwen3", 2560): "Qwen3-4B",
    ("qwen3", 4096): "Qwen3-8B",
    ("mistral", 5120): "Mistral Small",
}
_PIPELINES = {  # beginning of model_index.json's _class_name
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "Flux2": "flux2",
    "Flux": "flux1",
    "Chroma": "chroma",
    "QwenImage": "qwen-image",
    "ZImage": "z-image",
    "LatentConsistency": "lcm",
}

_KLEIN, _KLEIN_BASE = re.compile(r"klein (4b|9b)"), re.compile(r"klein.*\bbase\b|\bbase\b.*klein")


def file_kind(tensors: Mapping[str, TensorInfo]) -> str:
    """The kind (a key of KINDS) of a file with these tensors."""
    if any(word in name for name in tensors for word in _LORA_WORDS):
        return "lora"
    for word, kind in _TELLTALE.items():
        if any(word in name for name in tensors):
            return kind
    first_conv = _one(tensors, "input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight")
    if first_conv and not _is_vae(tensors):
        return _unet_kind(tensors)
    if _is_vae(tensors):
        return "vae"
    if _one(tensors, "token_embedding.weight", "shared.weight", "embed_tokens.weight"):
        return "text_encoder"
    return "other"


def _is_vae(tensors: Mapping[str, TensorInfo]) -> bool:
    has_unet = any("input_blocks." in name or name.startswith("time_embedding.") for name in tensors)
    return not has_unet and _one(tensors, "decoder.conv_in.weight") is not None


def _one(tensors: Mapping[str, TensorInfo], *endings: str) -> TensorInfo | None:
    return next((info for name, info in tensors.items() if name.endswith(endings)), None)


def _unet_kind(tensors: Mapping[str, TensorInfo]) -> str:
    width = _one(tensors, "attn2.to_k.weight")  # any block's: the text's width is the same in all
    text_width = width.shape[1] if width else 0
    if _one(tensors, "label_emb.0.0.weight", "add_embedding.linear_1.weight"):
        return "sdxl-refiner" if text_width == 1280 else "sdxl"
    if _one(tensors, "time_embedding.cond_proj.weight"):
        return "lcm"
    first = _one(tensors, "input_blocks.0.0.weight") or tensors.get("conv_in.weight")
    if text_width == 1024 or any(name.startswith("cond_stage_model.model.") for name in tensors):
        return "sd2"
    return "sd15-edit" if first and first.shape[1] != 4 else "sd15"


def text_kind(tensors: Mapping[str, TensorInfo]) -> str:
    """Which text encoder these tensors are: "t5", "qwen3", "mistral" (any other language model), "clip"; else ""."""
    if _one(tensors, "SelfAttention.relative_attention_bias.weight"):
        return "t5"
    if _one(tensors, "embed_tokens.weight"):
        return "qwen3" if _one(tensors, "self_attn.q_norm.weight") else "mistral"
    return "clip" if _one(tensors, "token_embedding.weight") else ""


def encoder_name(kind: str, width: int) -> str:
    """A text encoder of this kind and width for people: "Qwen3-4B (2560 wide)"."""
    words = {"clip": "a CLIP", "t5": "a T5", "qwen3": "a Qwen3", "mistral": "a language model"}
    return f"{_ENCODERS.get((kind, width), words.get(kind, 'something else'))} ({width} wide)"


def contents(tensors: Mapping[str, TensorInfo]) -> str:
    """What is in a file or folder, in words: one of KINDS, or a text encoder by its name."""
    kind = file_kind(tensors)
    table = _one(tensors, "token_embedding.weight", "shared.weight", "embed_tokens.weight")
    if kind != "text_encoder" or table is None:
        return KINDS[kind]
    return encoder_name(text_kind(tensors), table.shape[-1])


def folder_kind(model_index: Mapping[str, Any], unet_config: Mapping[str, Any] | None) -> str:
    """The kind of a diffusers folder by its model_index.json and its unet/config.json, if it has one."""
    pipeline = str(model_index.get("_class_name", ""))
    for beginning, kind in _PIPELINES.items():
        if pipeline.startswith(beginning):
            return kind
    if unet_config is None:
        return "other"
    if unet_config.get("addition_embed_type") == "text_time":
        return "sdxl"
    if unet_config.get("time_cond_proj_dim"):
        return "lcm"
    if unet_config.get("cross_attention_dim") == 1024:
        return "sd2"
    return "sd15-edit" if unet_config.get("in_channels", 4) != 4 else "sd15"


def klein_is_distilled(*said: str) -> bool | None:
    """Whether a Flux.2 klein is the distilled one, by what is said of it (id, metadata, name): the first that tells."""
    for text in said:
        words = re.sub(r"[_\-./]", " ", text.lower())
        if _KLEIN_BASE.search(words) or _KLEIN.search(words):
            return not _KLEIN_BASE.search(words)
    return None
