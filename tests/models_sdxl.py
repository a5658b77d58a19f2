"""A tiny SDXL with the true topology, random weights, in diffusers' layout and as a single file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.models import ZERO_SNR, byte_tokenizer, ldm_unet_name, ldm_vae

WIDTHS = (64, 128)  # of the two text encoders


def clip_config(width: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
                          num_attention_heads=width // 64, vocab_size=514, bos_token_id=512, eos_token_id=513,
                          projection_dim=width, hidden_act=act)


def folder(path: Path, prediction: str = "epsilon", zero_snr: bool = False) -> Path:
    """A diffusers folder of the tiny SDXL: three levels, the first without attention, two blocks deep at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64, 64), cross_attention_dim=sum(WIDTHS),
            attention_head_dim=[1, 1, 1], transformer_layers_per_block=[1, 1, 2], use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=6 * 256 + WIDTHS[1],
        ).save_pretrained(path / "unet")
        AutoencoderKL(block_out_channels=(32, 32, 32, 32), down_block_types=["DownEncoderBlock2D"] * 4,
                      up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, sample_size=64,
                      scaling_factor=0.13025).save_pretrained(path / "vae")
        CLIPTextModel(clip_config(WIDTHS[0], "quick_gelu")).save_pretrained(path / "text_encoder")
        CLIPTextModelWithProjection(clip_config(WIDTHS[1], "gelu")).save_pretrained(path / "text_encoder_2")
    byte_tokenizer().save_pretrained(path / "tokenizer")
    second = byte_tokenizer()
    second.pad_token = "!"
    second.save_pretrained(path / "tokenizer_2")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                  prediction_type=prediction, **(ZERO_SNR if zero_snr else {})).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
        "image_encoder": [None, None], "feature_extractor": [None, None], "force_zeros_for_empty_prompt": False,
    }))
    return path


def single_file(file: Path, source: Path, dtype: torch.dtype = torch.float32,
                extra: dict[str, Tensor] | None = None) -> Path:
    """The single file in Stability's names of a folder made by `folder`."""
    tensors = {}
    for name, tensor in load_file(source / "unet" / "diffusion_pytorch_model.safetensors").items():
        tensors["model.diffusion_model." + unet_name(name)] = tensor
    vae = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
    tensors |= {"first_stage_model." + name: tensor for name, tensor in ldm_vae(vae).items()}
    for name, tensor in load_file(source / "text_encoder" / "model.safetensors").items():
        tensors["conditioner.embedders.0.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    second = open_clip(load_file(source / "text_encoder_2" / "model.safetensors"))
    tensors |= {"conditioner.embedders.1.model." + name: tensor for name, tensor in second.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()} | (extra or {}), file)
    return file


def unet_name(name: str) -> str:
    if name.startswith("add_embedding.linear_"):
        number, kind = name.removeprefix("add_embedding.linear_").split(".")
        return f"label_emb.0.{2 * (int(number) - 1)}.{kind}"
    new = ldm_unet_name(name)
    return new.replace("output_blocks.2.1.conv", "output_blocks.2.2.conv")  # SDXL's first up block has attention


def open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder with projection in OpenCLIP's names."""
    inner = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj"}
    outer = {"embeddings.token_embedding.weight": "token_embedding.weight",
             "embeddings.position_embedding.weight": "positional_embedding",
             "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
    renamed = {"text_projection": tensors["text_projection.weight"].t()}
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if name in outer:
            renamed[outer[name]] = tensor
        elif name.startswith("encoder.layers."):
            _, _, number, rest = name.split(".", 3)
            block, kind = f"transformer.resblocks.{number}", rest.rsplit(".", 1)[1]
            if rest.startswith("self_attn.q_proj"):
                parts = [plain[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif rest.rsplit(".", 1)[0] in inner:
                renamed[f"{block}.{inner[rest.rsplit('.', 1)[0]]}.{kind}"] = tensor
    return renamed
