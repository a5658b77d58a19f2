"""Tiny Flux.1 and Flux.2 models with the true topology, random weights, in diffusers' layout and their authors'."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.models import byte_tokenizer, ldm_vae
from tests.models_sdxl import clip_config
from trainer.families.llm_text import _QWEN_TEMPLATE

VAE = dict(block_out_channels=(32, 32, 32, 32), down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, sample_size=64)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def t5_tokenizer() -> T5Tokenizer:
    """T5's kind of tokenizer with a token a letter."""
    letters = [chr(code) for code in range(33, 127)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0)]
                       + [(letter, -2.0) for letter in letters], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's kind of tokenizer with a token a byte."""
    vocabulary = {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), *SPECIALS])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(SPECIALS, special_tokens=True)
    tokenizer.chat_template = _QWEN_TEMPLATE
    return tokenizer


def flux1_folder(path: Path, guidance: bool = True) -> Path:
    """A diffusers folder of the tiny Flux.1: dev, or schnell without guidance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=64, guidance_embeds=guidance, axes_dims_rope=(4, 14, 14),
        ).save_pretrained(path / "transformer")
        AutoencoderKL(**VAE, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                      use_post_quant_conv=False).save_pretrained(path / "vae")
        CLIPTextModel(clip_config(64, "quick_gelu")).save_pretrained(path / "text_encoder")
        T5EncoderModel(T5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
                                feed_forward_proj="gated-gelu")).save_pretrained(path / "text_encoder_2")
    byte_tokenizer().save_pretrained(path / "tokenizer")
    t5_tokenizer().save_pretrained(path / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
                                    ).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps({
        "_class_name": "FluxPipeline", "_diffusers_version": "0.42.1",
        "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5Tokenizer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "image_encoder": [None, None],
        "feature_extractor": [None, None]}))
    return path


def flux2_vae(path: Path) -> None:
    vae = AutoencoderKLFlux2(**VAE, latent_channels=32)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    vae.save_pretrained(path / "vae")


def flux2_transformer(path: Path, joint: int, guidance: bool) -> None:
    Flux2Transformer2DModel(
        in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=joint, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance).save_pretrained(path / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(path / "scheduler")


def klein_folder(path: Path, distilled: bool | None = False) -> Path:
    """A diffusers folder of the tiny Flux.2 klein; distilled None leaves the flag out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux2_transformer(path, 48, guidance=False)
        flux2_vae(path)
        Qwen3ForCausalLM(Qwen3Config(
            vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=28, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
            tie_word_embeddings=True)).save_pretrained(path / "text_encoder")
    qwen_tokenizer().save_pretrained(path / "tokenizer")
    (path / "model_index.json").write_text(json.dumps({
        "_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.42.1",
        "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    } | ({} if distilled is None else {"is_distilled": distilled})))
    return path


def dev_folder(path: Path) -> Path:
    """A diffusers folder of the tiny Flux.2 dev: guidance embedded, Mistral inside a model that also sees."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux2_transformer(path, 48, guidance=True)
        flux2_vae(path)
        sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, head_dim=8)
        text = dict(sizes, model_type="mistral", vocab_size=264, num_hidden_layers=31, num_key_value_heads=1)
        vision = dict(sizes, model_type="pixtral", num_hidden_layers=1, image_size=32, patch_size=16)
        Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)
                                         ).save_pretrained(path / "text_encoder")
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = ("{% for message in messages %}[{{ message.role }}]{% for part in message.content %}"
                               "{{ part.text }}{% endfor %}{% endfor %}")
    tokenizer.save_pretrained(path / "tokenizer")
    (path / "model_index.json").write_text(json.dumps({
        "_class_name": "Flux2Pipeline", "_diffusers_version": "0.42.1",
        "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"], "tokenizer": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}))
    return path


def parts(source: Path) -> dict[str, dict[str, Tensor]]:
    """What the folder holds, each in the names of ComfyUI's split files."""
    found = {"transformer": bfl(_weights(source / "transformer")), "vae": flux_vae(_weights(source / "vae"))}
    for name in ("text_encoder", "text_encoder_2"):
        if (source / name).is_dir():
            tensors = _weights(source / name)
            found[name] = {key if not key.startswith(("embeddings", "encoder.layers", "final_layer_norm"))
                           else f"text_model.{key}": value for key, value in tensors.items()}
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def flux_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return ldm_vae(tensors)


def split_files(folder: Path, source: Path, prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """ComfyUI's split files of a folder: component -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, tensors in parts(source).items():
        start = prefix if name == "transformer" else ""
        files[name] = folder / f"{name}.safetensors"
        save_file({start + key: _cast(value, dtype) for key, value in tensors.items()}, files[name])
    return files


def whole_file(file: Path, source: Path) -> Path:
    """All of a folder in one file, as ComfyUI saves checkpoints."""
    names = parts(source)
    starts = {"transformer": "model.diffusion_model.", "vae": "vae.",
              "text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.t5xxl.transformer."}
    if "text_encoder_2" not in names:
        starts["text_encoder"] = "text_encoders.qwen3_4b.transformer."
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({starts[name] + key: value.contiguous() for name, tensors in names.items()
               for key, value in tensors.items()}, file)
    return file


def fp8_scaled(tensors: dict[str, Tensor], per_row: bool = False) -> dict[str, Tensor]:
    """Block linears in fp8 with ComfyUI's scales beside them."""
    found = {}
    for name, tensor in tensors.items():
        if "_blocks." in name and name.endswith(".weight") and tensor.ndim == 2:
            largest = tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().amax()
            scale = (largest / 448).float()
            found[name] = (tensor / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            found[name] = tensor
    return found


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


OUTER = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
         "norm_out.linear": "final_layer.adaLN_modulation.1", "timestep_embedder": "time_in",
         "guidance_embedder": "guidance_in", "text_embedder": "vector_in",
         "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
         "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
         "single_stream_modulation.linear": "single_stream_modulation.lin"}
INNER = {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.to_out.0": "img_attn.proj",
         "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
         "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0",
         "ff_context.net.2": "txt_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
         "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
         "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm"}
SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2", "attn.to_out": "linear2",
          "attn.to_qkv_mlp_proj": "linear1", "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
FUSED = {"attn.to_q": ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
         "attn.add_q_proj": ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))}


def bfl(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers transformer's tensors in its authors' names."""
    found = {}
    for name, tensor in tensors.items():
        block, kind = re.match(r"(?:single_)?transformer_blocks\.\d+\.", name), name.rsplit(".", 1)[1]
        path = name.removesuffix(f".{kind}")
        if block is None:
            if match := re.search(r"(\w+_embedder)\.linear_([12])$", path):
                path = f"{OUTER[match[1]]}.{'in' if match[2] == '1' else 'out'}_layer"
            else:
                path = OUTER[path]
            swapped = torch.cat(tensor.chunk(2)[::-1]) if "adaLN" in path else tensor
            found[f"{path}.{kind}"] = swapped
            continue
        single, inner = block[0].startswith("single"), path[len(block[0]):]
        new = block[0].replace("single_transformer_", "single_").replace("transformer_", "double_")
        ends = "scale" if "norm_" in inner else kind
        if single and inner == "attn.to_q":
            rows = [tensors[f"{block[0]}{part}.{kind}"] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            found[f"{new}linear1.{kind}"] = torch.cat(rows)
        elif not single and inner in FUSED:
            target, pieces = FUSED[inner]
            found[f"{new}{target}.{kind}"] = torch.cat([tensors[f"{block[0]}{part}.{kind}"] for part in pieces])
        elif inner in (SINGLE if single else INNER):
            found[f"{new}{(SINGLE if single else INNER)[inner]}.{ends}"] = tensor
    return found
