"""Rectified flow: the straight path from picture to noise, where on it to train, and the solver that walks it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.noise import draw_noise
from trainer.shifts import empirical_shift, resolution_shift, shift_sigmas

Sampling = Literal["uniform", "logit_normal", "sigmoid", "resolution"]
Guidance = Literal["classifier_free", "embedded", "none"]
Shift = Literal["none", "linear", "empirical"]
TIMESTEPS = 1000  # of sigma 1, in diffusers' count


class Moved(NamedTuple):
    """What a solver's step gives, named as in diffusers."""

    prev_sample: Tensor


class EulerSolver:
    """Euler's steps along dx/dσ = v from noise (σ = 1) to picture (σ = 0), used as diffusers' solvers are."""

    init_noise_sigma = 1.0

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.timesteps = sigmas * TIMESTEPS
        self._done = 0

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents

    def step(self, velocity: Tensor, timestep: Tensor, latents: Tensor) -> Moved:
        change = self.sigmas[self._done + 1] - self.sigmas[self._done]
        self._done += 1
        return Moved(latents + change * velocity)


@dataclass(frozen=True)
class FlowObjective:
    """Velocity ε - x_0 on x_σ = (1 - σ) x_0 + σ ε; Liu et al. 2209.03003, Lipman et al. 2210.02747.

    Timesteps are 1000 σ, real numbers. `guidance` says how the model is guided when it draws; `shift` how its own
    sampler spaces σ; `patch` is the side of a token in latents. The last four are train.timestep_*.
    """

    guidance: Guidance
    shift: Shift
    patch: int
    sampling: Sampling = "resolution"
    mean: float = 0.0
    scale: float = 1.0
    timestep_shift: float = 1.0
    prediction_type: str = "flow"
    num_timesteps = TIMESTEPS

    def with_sampling(self, sampling: str, mean: float, scale: float, timestep_shift: float) -> FlowObjective:
        """The same with another choice of training timesteps; "auto" keeps the family's own."""
        chosen = self.sampling if sampling == "auto" else sampling
        return replace(self, sampling=chosen, mean=mean, scale=scale, timestep_shift=timestep_shift)

    def to(self, device: torch.device | str) -> FlowObjective:
        """Itself: there is nothing to move."""
        return self

    def tokens(self, shape: Sequence[int]) -> int:
        """Image tokens of latents c h w."""
        return shape[-2] * shape[-1] // self.patch**2

    def draw(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str, dtype: torch.dtype,
             offset_noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Noise (b c h w) and timesteps (b), each sample a function of its seed; as `Objective.draw`."""
        generator = torch.Generator(device)
        noises, sigmas = [], []
        for seed in seeds:
            generator.manual_seed(seed)
            sigmas.append(self._sigma(generator, shape, device))
            noises.append(draw_noise(shape, generator, device, offset_noise))
        return torch.stack(noises).to(dtype), torch.cat(sigmas) * TIMESTEPS

    def _sigma(self, generator: torch.Generator, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """uniform; sigmoid of a scaled normal; logit-normal (Esser et al. 2403.03206, eq. 19); that, shifted by
        resolution."""
        if self.sampling == "uniform":
            sigma = torch.rand(1, generator=generator, device=device)
        else:
            normal = torch.randn(1, generator=generator, device=device)
            sigma = torch.sigmoid(normal * self.scale + (self.mean if self.sampling == "logit_normal" else 0.0))
        if self.sampling == "resolution":
            sigma = shift_sigmas(sigma, resolution_shift(self.tokens(shape)))
        return shift_sigmas(sigma, self.timestep_shift)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_σ = (1 - σ) x_0 + σ ε, b c h w."""
        sigma = (timesteps / TIMESTEPS).to(latents).view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity ε - x_0, b c h w."""
        return noise - latents

    def loss_weight(self, timesteps: Tensor, snr_gamma: float) -> Tensor:
        """All alike (b, fp32): where to train is said by the timesteps' distribution."""
        return torch.ones_like(timesteps)

    def quantile_timesteps(self, q: int) -> list[float]:
        """The middle of each of `q` equal parts of the path, rising; validation repeats them."""
        return [(i + 0.5) * TIMESTEPS / q for i in range(q)]

    def solver(self, steps: int, shape: Sequence[int], device: torch.device | str) -> EulerSolver:
        """The solver for latents of this shape, σ spaced as the model's own sampler does."""
        sigmas = torch.linspace(1, 1 / steps, steps, device=device)
        shifts = {"none": lambda: 1.0, "linear": lambda: resolution_shift(self.tokens(shape)),
                  "empirical": lambda: empirical_shift(self.tokens(shape), steps)}
        return EulerSolver(shift_sigmas(sigmas, shifts[self.shift]()))
