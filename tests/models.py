"""Tiny base models with the true topology of each family, random weights, in the layouts that people have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer import families

TEXT_WIDTH = 64
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's kind of tokenizer with a token a letter: 514 tokens, so that tiny models stay tiny."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def sd15_parts(vocab_size: int = 514) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet (2.5 M weights), VAE and text encoder of SD 1.5's topology, the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32, 64, 64),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            sample_size=64,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=TEXT_WIDTH,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=1,
                vocab_size=vocab_size,
                bos_token_id=vocab_size - 2,
                eos_token_id=vocab_size - 1,
            )
        )
    return unet, vae, text


def sd15_true_size() -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet, VAE and text encoder at SD 1.5's own sizes, with random weights: the first two in fp16, 2 GB in all."""
    configs = Path(families.__file__).parent / "configs" / "sd15"
    unet, vae, text = (json.loads((configs / f"{part}.json").read_text()) for part in ("unet", "vae", "text_encoder"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (UNet2DConditionModel.from_config(unet).half(), AutoencoderKL.from_config(vae).half(),
                CLIPTextModel(CLIPTextConfig(**text)))


def sd15_folder(folder: Path, prediction: str = "epsilon", zero_snr: bool = False, vocab_size: int = 514,
                true_size: bool = False) -> Path:
    """A diffusers folder of the tiny SD 1.5, with a byte tokenizer or (vocab_size 49408) without one."""
    vocab_size = 49408 if true_size else vocab_size
    unet, vae, text = sd15_true_size() if true_size else sd15_parts(vocab_size)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction,
        **(ZERO_SNR if zero_snr else {}),
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    if vocab_size == 514:
        byte_tokenizer().save_pretrained(folder / "tokenizer")
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def sd15_file(
    file: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """The single file, as A1111 and ComfyUI keep it, of a diffusers folder made by `sd15_folder`."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    tensors = {"model.diffusion_model." + ldm_unet_name(name): tensor for name, tensor in unet.items()}
    tensors |= {"first_stage_model." + name: tensor for name, tensor in ldm_vae(vae).items()}
    for name, tensor in text.items():
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | (extra or {}), file, metadata)
    return file


def ldm_unet_name(name: str) -> str:
    """A UNet tensor's LDM name from diffusers' (two resnets a block, as in all SD UNets)."""

    def number(step: int) -> int:
        return 3 * int(match[1]) + step

    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    outer = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    for start, new in outer.items():
        if name.startswith(f"{start}."):
            return new + name[len(start) :]
    if match := re.fullmatch(r"(?:down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv\.(.*)", name):
        if name.startswith("down"):
            return f"input_blocks.{number(3)}.0.op.{match[2]}"
        return f"output_blocks.{number(2)}.{1 if match[1] == '0' else 2}.conv.{match[2]}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        way, block, kind, index, rest = match.groups()
        place = 3 * int(block) + int(index) + (1 if way == "down" else 0)
        start = f"{'input' if way == 'down' else 'output'}_blocks.{place}.{0 if kind == 'resnets' else 1}."
    else:
        match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
        kind, index, rest = match.groups()
        start = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}."
    if kind == "resnets":
        part, ending = rest.split(".", 1)
        rest = f"{resnet[part]}.{ending}"
    return start + rest


def ldm_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE with four levels in LDM names; its attention as 1x1 convolutions, as LDM has it."""
    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
        new = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", new)
        new = re.sub(r"decoder\.up_blocks\.(\d)", lambda match: f"decoder.up.{3 - int(match[1])}", new)
        new = re.sub(r"(decoder\.up\.\d)\.resnets\.(\d)", r"\1.block.\2", new)
        new = re.sub(r"(decoder\.up\.\d)\.upsamplers\.0", r"\1.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = new.replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])", r"\1", new)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[new] = tensor
    return renamed
