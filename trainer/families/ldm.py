"""Single files in the original LDM layout (ComfyUI, A1111): configs from shapes, and names turned to diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from trainer.families.tensors import Part, TensorInfo, count_numbered, mapped_tensors, meta_tensors

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
_VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def convert_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's tensors by diffusers' names, from LDM names without prefix."""
    first_downsampling = min(
        (int(match[1]) for name in tensors if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))), default=3
    )
    prefixed = {UNET_PREFIX + name: tensor for name, tensor in tensors.items()}
    config: dict[str, Any] = {"layers_per_block": first_downsampling - 1}
    if "label_emb.0.0.weight" in tensors:
        config["addition_embed_type"] = "text_time"
    return convert_ldm_unet_checkpoint(prefixed, config)


def convert_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors by diffusers' names, from LDM names without prefix."""
    levels = count_numbered(tensors, r"encoder\.down\.(\d+)\.")
    config = {"down_block_types": [""] * levels, "up_block_types": [""] * levels}
    converted = convert_ldm_vae_checkpoint({VAE_PREFIX + name: tensor for name, tensor in tensors.items()}, config)
    statistics = {name: tensor for name, tensor in tensors.items() if name.startswith("bn.")}  # of Flux.2's latents
    return converted | statistics


def mend_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors with the names of old diffusers folders (attention as query, key …) turned to today's."""
    mended = {}
    for name, tensor in tensors.items():
        for old, new in _VAE_OLD_ATTENTION.items():
            name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        square = "attentions.0.to_" in name and tensor.ndim == 4
        mended[name] = tensor[:, :, 0, 0] if square else tensor  # 1x1 convolutions of old files
    return mended


def unet_tensors(part: Part) -> dict[str, Tensor]:
    """The UNet's memory-mapped tensors by diffusers' names."""
    tensors = mapped_tensors(part)
    return convert_unet(tensors) if part.layout == "ldm" else tensors


def vae_tensors(part: Part) -> dict[str, Tensor]:
    """The VAE's memory-mapped tensors by diffusers' names."""
    tensors = mapped_tensors(part)
    return convert_vae(tensors) if part.layout == "ldm" else mend_vae(tensors)


def unet_config(tensors: Mapping[str, TensorInfo], layout: str, template: Mapping[str, Any]) -> dict[str, Any]:
    """`template` with the sizes that a UNet's shapes tell; what shapes cannot tell (number of heads) stays."""
    names = meta_tensors(tensors)
    names = convert_unet(names) if layout == "ldm" else names
    levels = range(count_numbered(names, r"down_blocks\.(\d+)\."))
    crossed = [any(name.startswith(f"down_blocks.{i}.attentions.") for name in names) for i in levels]
    text = next(tensor for name, tensor in names.items() if name.endswith("attn2.to_k.weight"))
    widths = [names[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    config = dict(template) | {
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(crossed)],
        "layers_per_block": count_numbered(names, r"down_blocks\.0\.resnets\.(\d+)\."),
        "cross_attention_dim": text.shape[1],
        "in_channels": names["conv_in.weight"].shape[1],
        "out_channels": names["conv_out.weight"].shape[0],
    }
    added = names.get("add_embedding.linear_1.weight")
    return config if added is None else config | _xl_config(names, widths, added.shape[1])


def _xl_config(names: Mapping[str, Tensor], widths: list[int], added: int) -> dict[str, Any]:
    """What SDXL's shapes tell beside: depths, and heads, which are 64 wide."""
    depths = [count_numbered(names, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.")
              for i in range(len(widths))]
    return {
        "attention_head_dim": [max(1, width // 64) for width in widths],
        "transformer_layers_per_block": [max(1, depth) for depth in depths],
        "projection_class_embeddings_input_dim": added,
    }


def vae_config(tensors: Mapping[str, TensorInfo], layout: str, template: Mapping[str, Any]) -> dict[str, Any]:
    """`template` with the sizes that a VAE's shapes tell; its scaling factor cannot be told and stays."""
    names = meta_tensors(tensors)
    names = convert_vae(names) if layout == "ldm" else names
    levels = range(count_numbered(names, r"encoder\.down_blocks\.(\d+)\."))
    return dict(template) | {
        "block_out_channels": [names[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": count_numbered(names, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": names["decoder.conv_in.weight"].shape[1],
        "use_quant_conv": "quant_conv.weight" in names,
        "use_post_quant_conv": "post_quant_conv.weight" in names,
    }
