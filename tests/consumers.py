"""ComfyUI's, Forge's and A1111's rules for reading a LoRA, written from the formats page and not from trainer.export.

Base models are dicts in those programs' own layout: `diffusion_model.<path>.weight`, and text encoders as
`text_encoder.text_model.<path>.weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.models import ldm_unet_name
from tests.models_flux import bfl

UNETS = ("sd15", "sdxl")
FORGE_LIMIT = 12
CLIP_ATTENTION = ["k_proj", "out_proj", "q_proj", "v_proj"]
FLUX2_UNREAD = re.compile(r"((double|single)_stream_modulation|time_guidance_embed)")  # by diffusers' names


class Refused(Exception):
    """The program does not load the file."""


@dataclass(frozen=True)
class Spot:
    """Rows of a base weight; swapped: the file's halves of them are the other way round."""

    name: str
    start: int
    stop: int
    swapped: bool = False


def native(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A base's weights by diffusers' names (`unet.…`, `transformer.…`, `text_encoder.…`) in the programs' layout."""
    denoiser, found = {}, {}
    for name, tensor in weights.items():
        component, path = name.split(".", 1)
        if component in ("unet", "transformer"):
            denoiser[path] = tensor
        else:
            found[f"{component}.text_model.{path.removeprefix('text_model.')}"] = tensor
    if family in UNETS:
        renamed = {_unet_name(family, name): tensor for name, tensor in denoiser.items()}
    else:
        renamed = bfl(denoiser)
    return found | {f"diffusion_model.{name}": tensor for name, tensor in renamed.items()}


def _unet_name(family: str, name: str) -> str:
    if family == "sd15":
        return ldm_unet_name(name)
    if name.startswith("add_embedding.linear_"):
        return re.sub(r"add_embedding\.linear_([12])", lambda one: f"label_emb.0.{2 * int(one[1]) - 2}", name)
    # every up block of SDXL with an upsampler has attention before it
    return re.sub(r"(output_blocks\.\d+)\.1\.conv\.", r"\1.2.conv.", ldm_unet_name(name))


def _spots(family: str, weights: dict[str, Tensor]) -> dict[str, Spot]:
    """diffusers' module path → where its rows lie in the programs' layout, found by following numbered rows."""
    numbered, first, count = {}, {}, 0
    for name, tensor in weights.items():
        first[name.removesuffix(".weight")] = count
        numbered[name] = torch.arange(count, count + len(tensor))
        count += len(tensor)
    owner = {start: path for path, start in first.items()}
    found = {}
    for name, rows in native(family, numbered).items():
        for place, row in enumerate(rows.tolist()):
            if row in owner:
                size = len(weights[f"{owner[row]}.weight"])
                swapped = place + size > len(rows)  # the first row stands in the middle
                found[owner[row]] = Spot(name, 0 if swapped else place, size if swapped else place + size, swapped)
    return found


def _comfy_keys(family: str, weights: dict[str, Tensor]) -> dict[str, Spot]:
    """Every key that ComfyUI takes, and where it goes."""
    keys = {}
    for name, tensor in native(family, weights).items():
        if name.startswith("diffusion_model."):
            path, whole = name.removeprefix("diffusion_model.").removesuffix(".weight"), Spot(name, 0, len(tensor))
            keys |= {f"diffusion_model.{path}": whole, f"lora_unet_{path.replace('.', '_')}": whole}
    for path, spot in _spots(family, weights).items():
        component, inner = path.split(".", 1)
        flat = inner.replace(".", "_")
        if component == "unet":
            keys[f"lora_unet_{flat}"] = spot
            if ".attn1." not in inner and ".attn2." not in inner:
                keys[path] = spot
        elif component == "transformer" and not FLUX2_UNREAD.match(inner):
            keys |= dict.fromkeys([path, inner, f"lora_transformer_{flat}"], spot)
        elif component.startswith("text_encoder"):
            full = "text_model." + inner.removeprefix("text_model.")
            number = "2" if component.endswith("2") else "1"
            keys |= dict.fromkeys([f"{component}.{full}", f"lora_te{number}_{full.replace('.', '_')}"], spot)
            if number == "1":
                keys[f"lora_te_{full.replace('.', '_')}"] = spot
    return keys


def _a1111_keys(family: str, weights: dict[str, Tensor]) -> dict[str, Spot]:
    dropped = re.compile(r"lora_unet_(add_embedding|up_blocks_0_upsamplers_0_conv)" if family == "sdxl" else "$^")
    plain = re.compile(r"lora_te_" if family == "sdxl" else "$^")
    return {key: spot for key, spot in _comfy_keys(family, weights).items()
            if key.startswith("lora_") and not dropped.match(key) and not plain.match(key)}


def _forge_keys(family: str, weights: dict[str, Tensor]) -> dict[str, Spot]:
    return {key: spot for key, spot in _comfy_keys(family, weights).items()
            if key.startswith(("lora_", "diffusion_model.", "transformer.", "text_encoder"))}


def merged(program: str, file: dict[str, Tensor], family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's weights, in fp64 and the programs' layout, after the program has applied a LoRA at strength 1."""
    keys = {"comfyui": _comfy_keys, "a1111": _a1111_keys, "forge": _forge_keys}[program](family, weights)
    modules: dict[str, dict[str, Tensor]] = {}
    unmatched = 0
    for name, tensor in file.items():
        base, part = _split(name)
        if base in keys:
            modules.setdefault(base, {})[part] = tensor.double()
        else:
            unmatched += 1
    if program == "forge" and unmatched > FORGE_LIMIT:
        raise Refused(f"{unmatched} tensors unmatched")
    if program == "a1111" and any(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in file):
        raise Refused("no kind of module has these endings")
    if program == "a1111" and family == "sdxl":
        modules = _with_whole_attention(modules)
    result = {name: tensor.double() for name, tensor in native(family, weights).items()}
    for key, parts in modules.items():
        if {"up", "down"} <= parts.keys():
            spot = keys[key]
            rows = result[spot.name][spot.start : spot.stop]
            result[spot.name][spot.start : spot.stop] = _changed(program, rows, parts, spot.swapped)
    return result


def _split(name: str) -> tuple[str, str]:
    for part, endings in {"down": (".lora_down.weight", ".lora_A.weight"), "up": (".lora_up.weight", ".lora_B.weight"),
                          "alpha": (".alpha",), "dora": (".dora_scale",)}.items():
        for ending in endings:
            if name.endswith(ending):
                return name.removesuffix(ending), part
    return name, "unknown"


def _with_whole_attention(modules: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """A1111's second SDXL encoder is OpenCLIP's: its attention is one matrix, applied from all four parts or not."""
    def whole(key: str) -> bool:
        match = re.match(r"(lora_te2_.*_self_attn_)\w+_proj$", key)
        return match is None or all(match[1] + part in modules for part in CLIP_ATTENTION)

    return {key: parts for key, parts in modules.items() if whole(key)}


def _changed(program: str, weight: Tensor, parts: dict[str, Tensor], swapped: bool) -> Tensor:
    """W + alpha/r · up down, or with a DoRA scale what the program makes of it."""
    up, down = parts["up"], parts["down"]
    scale = parts["alpha"].item() / len(down) if "alpha" in parts else 1.0
    delta = (scale * up.flatten(1) @ down.flatten(1)).view(weight.shape)
    changed = weight + (torch.cat(delta.chunk(2)[::-1]) if swapped else delta)
    if "dora" not in parts:
        return changed
    dora, tail = parts["dora"], (1,) * (weight.ndim - 2)
    if dora.shape[0] == len(weight) and program != "a1111":  # the output axis: the norm of the base's weight
        return changed * (dora / weight.flatten(1).norm(dim=1).view(-1, 1, *tail))
    norms = changed.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *tail)
    return changed * (dora / norms)
