"""Base models of true size as people keep them (one file, or ComfyUI's split files), with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model

from tests import models, models_flux
from tests.bench import true_size
from tests.bench.true_size import CONFIGS, SIZES, Size

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
CHUNK = 1 << 24  # numbers that are drawn; a larger tensor has them several times

Tensors = dict[str, Tensor]


def write(file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, empty: bool = False) -> Path:
    """A safetensors file of these names and shapes (of meta tensors); matrices are random, gains one, the rest zero.

    empty: all zero, and never written: a file of gigabytes takes no time and no place, where nothing reads it.
    """
    entries, end = {}, 0
    for name, tensor in tensors.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * kind.itemsize
        entries[name] = {"dtype": CODES[kind], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    chunk = (torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for tensor in () if empty else tensors.values():
            for start in range(0, tensor.numel(), CHUNK):
                count = min(CHUNK, tensor.numel() - start)
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                part = chunk[:count] if tensor.ndim > 1 else torch.ones(count, dtype=kind)
                out.write(part.view(torch.uint8).numpy().data)
        out.truncate(8 + len(header) + end)
    return file


def denoiser(size: Size) -> Tensors:
    """A denoiser's tensors on the meta device."""
    return true_size.skeleton(size).state_dict()


def vae(family: str, kind: type = AutoencoderKL) -> Tensors:
    with init_empty_weights(include_buffers=True):
        return kind.from_config(json.loads((CONFIGS / family / "vae.json").read_text())).state_dict()


def sd15(folder: Path, tiny: bool) -> list[str]:
    """A1111's single file in fp16; returns the lines of a preset's [model]."""
    config = json.loads((CONFIGS / "sd15" / "text_encoder.json").read_text())
    size = SIZES["sd15"]
    if tiny:
        size = true_size.shrunk(size)
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    with init_empty_weights(include_buffers=False):
        text = CLIPTextModel(CLIPTextConfig.from_dict(config)).state_dict()
    tensors = {"model.diffusion_model." + models.ldm_unet_name(name): tensor for name, tensor in denoiser(size).items()}
    tensors |= {"first_stage_model." + name: tensor for name, tensor in models.ldm_vae(vae("sd15")).items()}
    tensors |= {"cond_stage_model.transformer.text_model." + name.removeprefix("text_model."): tensor
                for name, tensor in text.items()}
    file = write(folder / "sd15.safetensors", tensors, torch.float16)
    return ['family = "sd15"', f'base = "{file.as_posix()}"']


def klein_4b(folder: Path, tiny: bool) -> list[str]:
    """ComfyUI's split files, the transformer in bf16 by its authors' names; returns the lines of a preset's [model].

    The text encoder's file is empty: all captions are encoded alike, and with warm caches nothing reads it.
    """
    size = true_size.shrunk(SIZES["klein-4b"]) if tiny else SIZES["klein-4b"]
    config = json.loads((CONFIGS / "flux2" / "qwen3.json").read_text())
    width = true_size.config_of(size)["joint_attention_dim"] // 3
    config |= {"hidden_size": width} | ({"intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8,
                                         "num_key_value_heads": 1, "num_hidden_layers": 28} if tiny else {})
    with init_empty_weights(include_buffers=False):
        text = Qwen3Model(Qwen3Config.from_dict(config)).state_dict()
    files = {
        "base": write(folder / "flux-2-klein-base-4b.safetensors", models_flux.bfl(denoiser(size)), torch.bfloat16),
        "vae": write(folder / "flux2-vae.safetensors", models_flux.flux_vae(vae("flux2", AutoencoderKLFlux2)),
                     torch.float32),
        "text_encoder": write(folder / "qwen_3_4b.safetensors", {f"model.{name}": tensor for name, tensor in
                                                                 text.items()}, torch.bfloat16, empty=True),
    }
    return ['family = "flux2"', *(f'{key} = "{file.as_posix()}"' for key, file in files.items())]


MAKERS = {"sd15": sd15, "klein-4b": klein_4b}
