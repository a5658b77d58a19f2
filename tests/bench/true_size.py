"""Models of every family at their true sizes (or tiny ones of the same topology) with random weights made on the
device, and sessions that train them without a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from trainer import families, preset, session
from trainer.checkpoint import Progress
from trainer.data.order import Draw
from trainer.families import tensors
from trainer.schema import Preset
from trainer.session import Session

CONFIGS = Path(families.__file__).parent / "configs"
KINDS = {"sd15": UNet2DConditionModel, "sdxl": UNet2DConditionModel, "flux1": FluxTransformer2DModel,
         "flux2": Flux2Transformer2DModel}
RESOLUTIONS = {"sd15": 512, "sdxl": 1024, "flux1": 1024, "flux2": 1024}
BLOCK_LINEARS = {"sd15": ["attention", "feed_forward"], "sdxl": ["attention", "feed_forward"], "flux1": ["all"],
                 "flux2": ["all"]}  # the groups of adapter.targets that are all linears of the blocks


@dataclass(frozen=True)
class Size:
    """A model to measure, and the work that a step does with it."""

    family: str
    config: Mapping[str, Any]  # what differs from the family's own config
    resolution: int
    batch: int
    prompt: tuple[int, int]  # places, width
    pooled: int = 0
    tiny: Mapping[str, Any] | None = None  # what makes it small


_TINY_UNET = {"norm_num_groups": 8}  # the usual 32 leave two numbers in a norm: a step, which makes rounding large
_TINY_FLUX2 = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
               "joint_attention_dim": 48, "timestep_guidance_channels": 32, "axes_dims_rope": [4, 4, 4, 4]}
_KLEIN = {"guidance_embeds": False}
SIZES = {
    "sd15": Size("sd15", {}, 512, 4, (77, 768), tiny=_TINY_UNET | {
        "block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 64}),
    "sdxl": Size("sdxl", {}, 1024, 1, (77, 2048), 1280, tiny=_TINY_UNET | {
        "block_out_channels": [32, 64, 64], "cross_attention_dim": 64, "attention_head_dim": [1, 1, 1],
        "transformer_layers_per_block": [1, 1, 2], "projection_class_embeddings_input_dim": 6 * 256 + 64}),
    "flux1-dev": Size("flux1", {}, 1024, 1, (512, 4096), 768, tiny={
        "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 64, "axes_dims_rope": [4, 14, 14]}),
    "klein-4b": Size("flux2", _KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
                                        "joint_attention_dim": 7680}, 1024, 1, (512, 7680), tiny=_TINY_FLUX2),
    "klein-9b": Size("flux2", _KLEIN | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
                                        "joint_attention_dim": 12288}, 1024, 1, (512, 12288), tiny=_TINY_FLUX2),
    "flux2-dev": Size("flux2", {}, 1024, 1, (512, 15360), tiny=_TINY_FLUX2),
}
_PROMPT_WIDTH = ("cross_attention_dim", "joint_attention_dim")


def shrunk(size: Size) -> Size:
    """The tiny model of the same topology, at 64 pixels."""
    tiny = size.tiny or {}
    width = next(tiny[key] for key in _PROMPT_WIDTH if key in tiny)
    return Size(size.family, dict(size.config) | dict(tiny), 64, min(size.batch, 2), (size.prompt[0], width),
                64 if size.pooled else 0)


def config_of(size: Size) -> dict[str, Any]:
    """The denoiser's config."""
    name = "unet" if size.family in ("sd15", "sdxl") else "transformer"
    return json.loads((CONFIGS / size.family / f"{name}.json").read_text()) | dict(size.config)


def skeleton(size: Size) -> nn.Module:
    """The denoiser on the meta device."""
    with init_empty_weights(include_buffers=False):
        return KINDS[size.family].from_config(config_of(size))


class RandomWeights(Mapping[str, Tensor]):
    """Weights by name that are drawn on the device when asked for, and kept nowhere."""

    def __init__(self, shapes: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.shapes, self.device, self.dtype = shapes, device, dtype

    def __getitem__(self, name: str) -> Tensor:
        shape, make = self.shapes[name].shape, dict(device=self.device, dtype=self.dtype)
        if len(shape) > 1:
            return torch.empty(shape, **make).normal_(std=0.02)
        return torch.ones(shape, **make) if name.endswith("weight") else torch.zeros(shape, **make)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def denoiser_of(size: Size, quantize: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The denoiser with random weights, made (and quantised) tensor by tensor as files are read."""
    model = skeleton(size)
    return tensors.fill(model, RandomWeights(model.state_dict(), device, dtype), device, dtype, Path("random weights"),
                        quantize)


def vae_of(family: str, device: torch.device, tiny: bool = False) -> nn.Module:
    """A family's VAE with random weights in fp32, as runs hold it."""
    config = json.loads((CONFIGS / family / "vae.json").read_text())
    if tiny:
        config |= {"block_out_channels": [32] * len(config["block_out_channels"])}
    with init_empty_weights(include_buffers=False):
        vae = (AutoencoderKLFlux2 if family == "flux2" else AutoencoderKL).from_config(config)
    return tensors.fill(vae, RandomWeights(vae.state_dict(), device, torch.float32), device, torch.float32,
                        Path("random weights"))


class RandomLatents:
    """Stands for a `LatentStore`: the same latents for every draw."""

    def __init__(self, size: Size, family: Any) -> None:
        side = size.resolution
        self.kept = torch.randn(size.batch, *family.latent_shape(side, side))
        self.items = [SimpleNamespace(width=side, height=side)]
        self.sizes, self.offsets = [(side, side)], [[(0, 0)]]

    def latents(self, draws: list[Draw], device: torch.device) -> Tensor:
        return self.kept.to(device)


class RandomTexts:
    """Stands for a `TextStore`."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        self.kept = {"prompt_embeds": torch.randn(size.batch, *size.prompt, dtype=dtype)}
        if size.pooled:
            self.kept["pooled"] = torch.randn(size.batch, size.pooled, dtype=dtype)

    def embeds(self, texts: list[str]) -> dict[str, Tensor]:
        return self.kept


def preset_of(size: Size, method: str, rank: int, changes: Sequence[str] = ()) -> Preset:
    """The preset that would train it, with changes such as "train.ema_decay=0.99"."""
    lines = [f'[model]\nfamily = "{size.family}"\nbase = "random"', '[data]\nfolder = "none"',
             f"resolution = {size.resolution}", f'[adapter]\nmethod = "{method}"\nrank = {rank}',
             f"targets = {json.dumps(BLOCK_LINEARS[size.family])}", f"[train]\nsteps = 100\nbatch_size = {size.batch}"]
    return preset.complete(preset.parse("\n".join(lines), "random.toml", changes), Path())


def base_of(size: Size) -> Any:
    """Stands for a `Base`: what objectives look at."""
    scheduler = CONFIGS / size.family / "scheduler.json"
    return SimpleNamespace(parts={"transformer": SimpleNamespace(config=config_of(size))}, distilled=False,
                           scheduler_config=json.loads(scheduler.read_text()) if scheduler.is_file() else {},
                           prediction_type="epsilon")


def session_of(size: Size, chosen: Preset, denoiser: nn.Module, device: torch.device, dtype: torch.dtype) -> Session:
    """The trainer's session around a denoiser that is loaded; whatever comes from files is random."""
    family, base = families.get(size.family), base_of(size)
    adapter = session.build_adapter(chosen, family, denoiser, None, device)
    without_files = {"recorder", "run", "cache", "held_latents", "held_masks", "order", "text_encoder"}
    return Session(
        **dict.fromkeys(without_files), preset=chosen, guard=lambda: None, device=device, dtype=dtype, family=family,
        base=base, material=SimpleNamespace(loss_weights=lambda latents, draws: None), captions=[[""]],
        latents=RandomLatents(size, family), masks=SimpleNamespace(masks=lambda draws, device: None),
        texts=RandomTexts(size, dtype), objective=session.find_objective(chosen, base).to(device), denoiser=denoiser,
        adapter=adapter, optimizer=session.build_optimizer(chosen, adapter), schedule=lambda step: 1.0, steps=100,
        progress=Progress())


def batch_of(size: Size, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Random latents and embeddings, on the host."""
    return RandomLatents(size, families.get(size.family)).kept, RandomTexts(size, dtype).kept


def draws(size: Size, step: int) -> list[Draw]:
    """The samples of a step."""
    return [Draw(0, step * size.batch + number, 0, False, 0) for number in range(size.batch)]
