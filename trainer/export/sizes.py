"""Shapes of the layers that a LoRA is for: those of the family's true models, or of the base at hand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from trainer import families
from trainer.errors import UserError
from trainer.export.formats import FAMILIES
from trainer.export.names import canonical
from trainer.families import bfl, clip_pair, clip_text, ldm, open_clip
from trainer.families.folders import component, read_json
from trainer.families.recognise import KINDS, file_kind
from trainer.families.tensors import Header, Part, meta_tensors, read_header, without_prefix

Sizes = Mapping[str, tuple[int, ...]]  # module path -> shape of its weight: m n, or m c k k

_CONFIGS = Path(families.__file__).parent / "configs"
_DENOISERS = {"sd15": UNet2DConditionModel, "sdxl": UNet2DConditionModel, "flux1": FluxTransformer2DModel,
              "flux2": Flux2Transformer2DModel}
_KLEIN = {"guidance_embeds": False, "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20,
          "joint_attention_dim": 7680}
_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {  # what differs from the family's config
    "sd15": {"SD 1.5": {}}, "sdxl": {"SDXL": {}}, "flux1": {"Flux.1": {}},
    "flux2": {"Flux.2 dev": {}, "Flux.2 klein 4B": _KLEIN, "Flux.2 klein 9B": _KLEIN | {
        "num_attention_heads": 32, "num_layers": 8, "num_single_layers": 24, "joint_attention_dim": 12288}},
}
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


@cache
def true_sizes(family: str) -> dict[str, Sizes]:
    """Shapes of every layer of a family's models, by the model's name; built without weights."""
    found = {}
    for name, changes in _VARIANTS[family].items():
        kind = _DENOISERS[family]
        part = "unet" if kind is UNet2DConditionModel else "transformer"
        with init_empty_weights():
            model = kind.from_config(read_json(_CONFIGS / family / f"{part}.json") | changes)
        layers = {f"{part}.{path}": tuple(module.weight.shape) for path, module in model.named_modules()
                  if isinstance(module, (nn.Linear, nn.Conv2d))}
        found[name] = layers | _text_sizes(family)
    return found


def _text_sizes(family: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for part in ("text_encoder", "text_encoder_2"):
        file = _CONFIGS / family / f"{part}.json"
        if not file.is_file() or family == "flux2":
            continue
        config = read_json(file)
        layers = _t5(config) if "d_model" in config else _clip(config)
        found |= {f"{part}.{path}": shape for path, shape in layers.items()}
    return found


def _clip(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    d, inner = config["hidden_size"], config["intermediate_size"]
    parts = {f"self_attn.{part}": (d, d) for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
    parts |= {"mlp.fc1": (inner, d), "mlp.fc2": (d, inner)}
    return {f"text_model.encoder.layers.{i}.{path}": shape for i in range(config["num_hidden_layers"])
            for path, shape in parts.items()}


def _t5(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    d, inner, heads = config["d_model"], config["d_ff"], config["d_kv"] * config["num_heads"]
    parts = {f"0.SelfAttention.{part}": (heads, d) for part in "qkv"} | {"0.SelfAttention.o": (d, heads)}
    parts |= {"1.DenseReluDense.wi_0": (inner, d), "1.DenseReluDense.wi_1": (inner, d),
              "1.DenseReluDense.wo": (d, inner)}
    return {f"encoder.block.{i}.layer.{path}": shape for i in range(config["num_layers"])
            for path, shape in parts.items()}


def base_sizes(path: Path, family: str) -> Sizes:
    """Shapes of every layer of a base model, from its headers: a diffusers folder, a single file, or a denoiser alone.

    Text encoders that a file does not hold have the family's true sizes. Raises UserError for a base that is missing,
    damaged or of another family.
    """
    shapes = _folder_sizes(path) if path.is_dir() else _file_sizes(read_header(path), family)
    denoiser = "transformer." if family.startswith("flux") else "unet."
    if not any(name.startswith(denoiser) for name in shapes):
        raise UserError(f"{path} has no {denoiser[:-1]}, and the LoRA is for {FAMILIES[family]}: give its own base")
    held = {name.partition(".")[0] for name in shapes}
    return shapes | {name: shape for name, shape in _text_sizes(family).items() if name.partition(".")[0] not in held}


def _folder_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in _COMPONENTS:
        if (folder / name / "config.json").is_file():
            found |= _weights(name, component(folder / name))
    if not found:
        raise UserError(f"{folder} is no diffusers folder: it has neither unet nor transformer. Give the folder that "
                        "holds model_index.json, or a single .safetensors file")
    return found


def _file_sizes(header: Header, family: str) -> dict[str, tuple[int, ...]]:
    kind = file_kind(header.tensors)
    if kind != family:
        raise UserError(f"{header.file} is {KINDS[kind]}, and the LoRA is for {FAMILIES[family]}: give its own base")
    names = without_prefix(header.tensors, ldm.UNET_PREFIX) or header.tensors
    tensors = meta_tensors(names)
    if family.startswith("flux"):
        named = bfl.renamed(tensors) if "img_in.weight" in names else tensors
        return _shapes("transformer", named)
    found = _shapes("unet", tensors if "conv_in.weight" in names else ldm.convert_unet(tensors))
    prefixes = clip_pair.PREFIXES if family == "sdxl" else clip_text.PREFIXES
    for prefix in prefixes:
        found |= _shapes("text_encoder", meta_tensors(without_prefix(header.tensors, prefix)))
    if second := without_prefix(header.tensors, "conditioner.embedders.1.model."):
        found |= _shapes("text_encoder_2", open_clip.renamed(meta_tensors(second)))
    return found


def _weights(component_name: str, part: Part) -> dict[str, tuple[int, ...]]:
    return _shapes(component_name, meta_tensors(part.tensors))


def _shapes(component_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {canonical(f"{component_name}.{name.removesuffix('.weight')}"): tuple(tensor.shape)
            for name, tensor in tensors.items() if name.endswith(".weight") and tensor.ndim in (2, 4)}
