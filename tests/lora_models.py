"""Tiny denoisers and text encoders of every family, adapters over them, and diffusers' pipelines to load LoRAs into."""

from __future__ import annotations

import copy
from functools import cache

import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer import adapters, families
from trainer.adapters import Adapter

SIZES = {"sd15": "sd15", "sdxl": "sdxl", "flux1": "flux1", "klein": "flux2", "dev": "flux2"}  # model: its family
CLIP = dict(intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=100, bos_token_id=98,
            eos_token_id=99)


@cache
def parts(model: str) -> dict[str, nn.Module]:
    """The components of a tiny model, the same weights each time; copy before you change them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = _parts(model)
    return {name: module.requires_grad_(False).eval() for name, module in made.items()}


def _parts(model: str) -> dict[str, nn.Module]:
    if model == "sd15":
        return {"unet": UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8, 16, 16), cross_attention_dim=24, norm_num_groups=4,
            attention_head_dim=2), "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=24, **CLIP))}
    if model == "sdxl":
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16, 16), cross_attention_dim=56, attention_head_dim=[1, 2, 2],
            transformer_layers_per_block=[1, 1, 2], use_linear_projection=True, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
        second = CLIPTextConfig(hidden_size=32, projection_dim=32, **CLIP)
        return {"unet": unet, "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=24, **CLIP)),
                "text_encoder_2": CLIPTextModelWithProjection(second)}
    sizes = dict(num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2)
    if model == "flux1":
        return {"transformer": FluxTransformer2DModel(in_channels=16, joint_attention_dim=24, pooled_projection_dim=24,
                                                      guidance_embeds=True, axes_dims_rope=(4, 6, 6), **sizes)}
    return {"transformer": Flux2Transformer2DModel(
        in_channels=16, joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=model == "dev", **sizes)}


def weights(model: str, components: dict[str, nn.Module] | None = None) -> dict[str, Tensor]:
    """diffusers' module path + ".weight" → weight of every Linear and Conv2d, with CLIP's `text_model`."""
    found = {}
    for component, module in (components or parts(model)).items():
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and path != "text_projection":
                inner = f"text_model.{path.removeprefix('text_model.')}" if "text" in component else path
                found[f"{component}.{inner}.weight"] = layer.weight.detach()
    return found


def pipeline(model: str) -> DiffusionPipeline:
    """diffusers' own pipeline over a copy of the tiny model, without VAE and tokenizers."""
    own = copy.deepcopy(parts(model))
    nothing = dict(vae=None, tokenizer=None)
    flow = FlowMatchEulerDiscreteScheduler()
    if model == "sd15":
        return StableDiffusionPipeline(**nothing, **own, scheduler=EulerDiscreteScheduler(steps_offset=1),
                                       safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if model == "sdxl":
        return StableDiffusionXLPipeline(**nothing, **own, tokenizer_2=None, scheduler=EulerDiscreteScheduler())
    if model == "flux1":
        return FluxPipeline(**nothing, **own, scheduler=flow, text_encoder=None, text_encoder_2=None, tokenizer_2=None)
    kind = Flux2KleinPipeline if model == "klein" else Flux2Pipeline
    return kind(**nothing, **own, scheduler=flow, text_encoder=None)


def targets(model: str, groups: tuple[str, ...], fuse: bool = True) -> list[adapters.Target]:
    """The family's own choice of layers over the tiny model."""
    family, components = families.get(SIZES[model]), parts(model)
    models = {name: module for name, module in components.items() if not name.startswith("text")}
    chosen = {"fuse": fuse} if "transformer" in models else {}
    found = family.adapter_targets(models, [group for group in groups if group != "text_encoder"], **chosen)
    if "text_encoder" in groups:
        for name in ("text_encoder", "text_encoder_2"):
            if name in components:
                found += families.unet.clip_targets(name, components[name])
    return found


def adapter(model: str, groups: tuple[str, ...], method: str, fuse: bool = True, seed: int = 5,
            **options: object) -> Adapter:
    """An adapter whose factors have moved, not installed."""
    made = adapters.build(targets(model, groups, fuse), method=method, rank=3, seed=1, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in made.parameters():
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    return made


def expected(model: str, made: Adapter, pairs: list[tuple] | None = None) -> dict[str, Tensor]:
    """The model's weights (as `weights` names them) with the adapter in them, in fp64."""
    result = {name: tensor.double() for name, tensor in weights(model).items()}
    names = {id(layer): name.removesuffix(".weight") for name, layer in _layers(model).items()}
    for target, (_, up, down, magnitude) in zip(made.layout.targets, pairs or made.pairs("raw"), strict=True):
        own = [f"{names[id(module)]}.weight" for module in target.modules]
        delta = (up.double().flatten(1) @ down.double().flatten(1)).split([len(result[name]) for name in own])
        for name, piece in zip(own, delta):
            changed = result[name] + piece.view(result[name].shape)
            if magnitude is not None:
                tail = (1,) * (changed.ndim - 2)
                changed *= magnitude.double() / changed.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *tail)
            result[name] = changed
    return result


def _layers(model: str) -> dict[str, nn.Module]:
    found = {}
    for component, module in parts(model).items():
        for path, layer in module.named_modules():
            inner = f"text_model.{path.removeprefix('text_model.')}" if "text" in component else path
            found[f"{component}.{inner}.weight"] = layer
    return found
