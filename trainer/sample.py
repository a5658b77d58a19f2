"""Pictures for a step of a run: a diffusers solver over the denoiser, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from trainer.families.unet import VAE_FACTOR
from trainer.faults import out_of_memory
from trainer.flow import FlowObjective
from trainer.gpu import free_memory
from trainer.objective import Objective

TILE = 512  # pixels: holds a quarter of what a picture of 1024 does


def build_solver(objective: Objective, steps: int, device: torch.device | str) -> SchedulerMixin:
    """DPM-Solver++(2M) (Lu et al. 2211.01095) on the base's own schedule.

    Trailing spacing begins at the last, noisiest timestep, as zero terminal SNR needs: Lin et al. 2305.08891, §3.3.
    """
    solver = DPMSolverMultistepScheduler.from_config(objective.scheduler_config, timestep_spacing="trailing")
    solver.set_timesteps(steps, device=device)
    return solver


def initial_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Standard normal latents (b c h w, fp32), each from its own seed, the same on every device."""
    noises = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noises).to(device)


def guided(
    predict: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
    noisy: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    guidance: float,
) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2207.12598): n + guidance · (c - n), b c h w in fp32.

    One forward pass for both, two when a prompt is longer than the negative one; none for it at guidance 1 and below.
    """
    timesteps = timestep.expand(len(noisy))
    if guidance <= 1:
        return predict(noisy, timesteps, conditioning).float()
    if all(conditioning[name].shape == negative[name].shape for name in conditioning):
        both = {name: torch.cat([conditioning[name], negative[name]]) for name in conditioning}
        prediction = predict(torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both).float()
        toward, away = prediction.chunk(2)
    else:
        toward = predict(noisy, timesteps, conditioning).float()
        away = predict(noisy, timesteps, negative).float()
    return away + guidance * (toward - away)


@torch.no_grad()
def draw(
    family: ModuleType,
    denoiser: nn.Module,
    objective: Objective | FlowObjective,
    *,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    width: int,
    height: int,
    device: torch.device | str,
    dtype: torch.dtype,
    batch_size: int = 4,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Tensor]:
    """Yield the latents (b c h w, fp32) of pictures of width x height pixels, one for each seed in order, by batches.

    `conditioning` has a row for each seed, `negative` one row for all. A picture depends on its own row and seed only
    (up to rounding). The denoiser sees `dtype`, the solver works in fp32. Ends early, between two solver steps, once
    `should_stop()` is true.
    """
    shape = family.latent_shape(width, height)
    for rows in torch.arange(len(seeds)).split(batch_size):
        prompts = {name: value[rows.to(value.device)].to(device, dtype) for name, value in conditioning.items()}
        away = {name: value.to(device, dtype).expand(len(rows), *value.shape[1:]) for name, value in negative.items()}
        solver = (objective.solver(steps, shape, device) if isinstance(objective, FlowObjective)
                  else build_solver(objective, steps, device))
        if objective.guidance == "embedded":
            prompts["guidance"] = torch.full((len(rows),), guidance, device=device)
        scale = guidance if objective.guidance == "classifier_free" else 1.0
        latents = initial_noise([seeds[row] for row in rows], shape, device) * solver.init_noise_sigma
        for timestep in solver.timesteps:
            if should_stop is not None and should_stop():
                return
            noisy = solver.scale_model_input(latents, timestep).to(dtype)
            prediction = guided(partial(family.predict, denoiser), noisy, timestep, prompts, away, scale)
            latents = solver.step(prediction, timestep, latents).prev_sample
        yield latents


@torch.no_grad()
def decode(family: ModuleType, vae: nn.Module, batches: Iterable[Tensor]) -> Iterator[Image.Image]:
    """Yield the pictures of latents b c h w; in tiles once a whole picture does not fit into the GPU's memory."""
    for latents in batches:
        try:
            pictures = family.decode_latents(vae, latents)  # b h w 3
        except Exception as error:
            if not out_of_memory(error) or vae.use_tiling:
                raise
            error.__traceback__ = None  # its frames hold what was decoded so far
            use_tiles(vae)
            free_memory()
            pictures = family.decode_latents(vae, latents)
        for picture in pictures.cpu().numpy():
            yield Image.fromarray(picture)


def use_tiles(vae: nn.Module) -> None:
    """Let a VAE decode tiles of TILE pixels that overlap by a quarter and are blended."""
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // VAE_FACTOR
