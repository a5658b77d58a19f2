"""The tiny models of `lora_models` on the disk, in the layouts that base models have, and LoRAs for them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import lora_models
from tests.models import ldm_unet_name
from tests.models_flux import bfl
from tests.models_sdxl import open_clip, unet_name
from trainer.export.metadata import BASES
from trainer.export.writer import write

PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux1": "FluxPipeline",
             "klein": "Flux2KleinPipeline", "dev": "Flux2Pipeline"}


def folder(path: Path, model: str, components: dict[str, nn.Module] | None = None, shard: str = "10GB") -> Path:
    """A diffusers folder with the components that LoRAs change."""
    for name, module in (components or lora_models.parts(model)).items():
        module.save_pretrained(path / name, max_shard_size=shard)
    (path / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[model]}))
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text("{}")
    return path


def file(path: Path, source: Path, model: str, prefix: str = "model.diffusion_model.") -> Path:
    """A single file in its authors' layout of a folder made by `folder`."""
    parts = {name: stored(source / name) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    if model in ("sd15", "sdxl"):
        rename, text = {"sd15": (ldm_unet_name, "cond_stage_model.transformer.text_model."),
                        "sdxl": (unet_name, "conditioner.embedders.0.transformer.text_model.")}[model]
        tensors = {prefix + rename(name): tensor for name, tensor in parts["unet"].items()}
        tensors |= {text + name.removeprefix("text_model."): value for name, value in parts["text_encoder"].items()}
        if parts["text_encoder_2"]:
            tensors |= {f"conditioner.embedders.1.model.{name}": tensor
                        for name, tensor in open_clip(parts["text_encoder_2"]).items()}
    else:
        tensors = {prefix + name: tensor for name, tensor in bfl(parts["transformer"]).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"modelspec.title": "tiny"})
    return path


def stored(component: Path) -> dict[str, Tensor]:
    """Every tensor of a component, its shards together."""
    found: dict[str, Tensor] = {}
    for file in component.glob("*.safetensors"):
        found |= load_file(file)
    return found


def lora(path: Path, model: str, groups: tuple[str, ...], form: str = "auto", seed: int = 5, **options: object) -> Path:
    """A LoRA for the tiny model whose factors have moved, in fp32."""
    adapter = lora_models.adapter(model, groups, options.pop("method", "lora"), seed=seed, **options)
    family = lora_models.SIZES[model]
    write(path, adapter.pairs("raw"), family=family, dtype="fp32", form=form, metadata={
        "modelspec.title": path.stem, "ss_network_dim": "?", "ss_base_model_version": BASES[family].version})
    return path


def fused(model: str, files: dict[Path, float]) -> dict[str, nn.Module]:
    """diffusers' own model with LoRAs loaded and fused at their weights."""
    pipe = lora_models.pipeline(model)
    for path, weight in files.items():
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=path.stem)
        pipe.set_adapters(path.stem)
        pipe.fuse_lora(lora_scale=weight)
        pipe.unload_lora_weights()
    return {name: getattr(pipe, name) for name in lora_models.parts(model)}
