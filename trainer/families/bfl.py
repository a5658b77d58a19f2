"""Flux.1's and Flux.2's transformers in their authors' names (single files, ComfyUI): turned to diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.families.tensors import Part, TensorInfo, count_numbered, mapped_tensors, meta_tensors

PREFIX = "model.diffusion_model."
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}
_EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
_DOUBLE = {
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_DOUBLE_MLP = {1: ("ff.net.0.proj", "ff.net.2"), 2: ("ff.linear_in", "ff.linear_out")}
_SINGLE = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",), "modulation.lin": ("norm.linear",)}
_SINGLE_LINEAR = {
    1: {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",)},
    2: {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
}


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors by diffusers' names; what diffusers keeps apart (q, k, v) are views of the stacked rows.

    Scales of fp8 weights (`scale_weight`) go along. Names that are none of the transformer's are left out.
    """
    generation = 2 if any(name.startswith("double_stream_modulation") for name in tensors) else 1
    hidden = tensors["img_in.weight"].shape[0]
    found = {}
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1) if "." in name else (name, "")
        kind = {"scale": "weight", "weight_scale": "scale_weight"}.get(kind, kind)
        targets = _targets(module, generation)
        if module == "final_layer.adaLN_modulation.1":  # (shift, scale) here, (scale, shift) in diffusers
            tensor = torch.cat(tensor.chunk(2)[::-1]) if tensor.ndim and tensor.shape[0] > 1 else tensor
        for target, piece in zip(targets, _pieces(tensor, len(targets), hidden)):
            found[f"{target}.{kind}"] = piece
    return found


def _targets(module: str, generation: int) -> list[str]:
    if module in _OUTER:
        return [_OUTER[module]]
    if match := re.fullmatch(r"(time_in|guidance_in|vector_in)\.(in|out)_layer", module):
        parent = "time_text_embed" if generation == 1 else "time_guidance_embed"
        return [f"{parent}.{_EMBEDDERS[match[1]]}.linear_{1 if match[2] == 'in' else 2}"]
    if match := re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module):
        kind, number, rest = match.groups()
        if kind == "single":
            parts = (_SINGLE | _SINGLE_LINEAR[generation]).get(rest, ())
            return [f"single_transformer_blocks.{number}.{part}" for part in parts]
        if mlp := re.fullmatch(r"(img|txt)_mlp\.([02])", rest):
            part = _DOUBLE_MLP[generation][int(mlp[2]) // 2]
            return [f"transformer_blocks.{number}.{part if mlp[1] == 'img' else part.replace('ff.', 'ff_context.')}"]
        return [f"transformer_blocks.{number}.{part}" for part in _DOUBLE.get(rest, ())]
    return []


def _pieces(tensor: Tensor, count: int, hidden: int) -> list[Tensor]:
    """The rows of stacked modules: all of `hidden` rows but a fourth, which has the rest; a lone scale is for all."""
    if count <= 1 or tensor.ndim == 0 or tensor.shape[0] == 1:
        return [tensor] * count
    return list(tensor.split([hidden] * 3 + ([tensor.shape[0] - 3 * hidden] if count == 4 else [])))


def transformer_tensors(part: Part) -> dict[str, Tensor]:
    """The transformer's memory-mapped tensors by diffusers' names."""
    tensors = mapped_tensors(part)
    return renamed(tensors) if part.layout == "bfl" else tensors


def transformer_config(tensors: Mapping[str, TensorInfo], layout: str, template: Mapping[str, Any]) -> dict[str, Any]:
    """`template` with the sizes that the shapes tell; raises KeyError when the transformer is not complete."""
    names = meta_tensors(tensors)
    names = renamed(names) if layout == "bfl" else names
    hidden, channels = names["x_embedder.weight"].shape
    head = names["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    embed = "time_text_embed" if "time_text_embed.timestep_embedder.linear_1.weight" in names else "time_guidance_embed"
    config = dict(template) | {
        "in_channels": channels,
        "num_layers": count_numbered(names, r"transformer_blocks\.(\d+)\."),
        "num_single_layers": count_numbered(names, r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": names["context_embedder.weight"].shape[1],
        "axes_dims_rope": [dim * head // 128 for dim in template["axes_dims_rope"]],
        "guidance_embeds": f"{embed}.guidance_embedder.linear_1.weight" in names,
    }
    if embed == "time_text_embed":
        return config | {"pooled_projection_dim": names[f"{embed}.text_embedder.linear_1.weight"].shape[1]}
    return config | {
        "mlp_ratio": names["transformer_blocks.0.ff.linear_out.weight"].shape[1] / hidden,
        "timestep_guidance_channels": names[f"{embed}.timestep_embedder.linear_1.weight"].shape[1],
    }
