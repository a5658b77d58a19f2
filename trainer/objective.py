"""What a denoiser is trained to predict: noise levels, targets and loss weights, apart from any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from trainer.noise import draw_noise

Prediction = Literal["epsilon", "v_prediction"]
MOST_WEIGHT = 10.0  # that a pixel of a small mask may get: a few pixels must not make up a whole gradient


def schedule(scheduler_config: Mapping[str, Any]) -> Tensor:
    """ᾱ_t of a diffusers scheduler config, by DDPM's index t (T, fp64).

    With `rescale_betas_zero_snr` the last entry is exactly 0: Lin et al. 2305.08891, algorithm 1.
    """
    return DDIMScheduler.from_config(dict(scheduler_config)).alphas_cumprod.double()


def snr(alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ/(1-ᾱ) of each entry."""
    return alphas_cumprod / (1.0 - alphas_cumprod)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: Prediction) -> Tensor:
    """Min-SNR-γ: min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR+1) for v; Hang et al. 2303.09556, §3.4.

    At SNR 0 (zero terminal SNR) ε's weight is its limit 1; v's is 0.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return clipped / (snr + 1.0)
    return torch.where(snr > 0, clipped / snr.clamp(min=torch.finfo(snr.dtype).tiny), 1.0)


def pixel_weights(mask: Tensor, background: float) -> Tensor:
    """Weights of the loss at each place, b 1 h w, from how much of it a mask covers: 1 there, `background` elsewhere.

    Their mean is 1 in each sample, so that an image counts as much as any other however small its mask is, and a
    learning rate means the same with masks and without; no weight goes beyond `MOST_WEIGHT`.
    """
    weights = background + (1.0 - background) * mask
    return weights / weights.mean(dim=(-2, -1), keepdim=True).clamp(min=1.0 / MOST_WEIGHT)


def per_sample_loss(
    prediction: Tensor,
    target: Tensor,
    kind: Literal["mse", "huber"] = "mse",
    delta: float = 0.1,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean error of each sample, in fp32: b … -> b. Huber is scaled to equal the square below `delta`.

    `weights` multiply the error at each place, b 1 h w.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "huber":
        error = 2.0 * F.huber_loss(prediction, target, reduction="none", delta=delta)
    else:
        error = F.mse_loss(prediction, target, reduction="none")
    if weights is not None:
        error = error * weights
    return error.flatten(1).mean(1)  # b


@dataclass(frozen=True)
class Objective:
    """DDPM's objective on noise (ε) or velocity (v), for one noise schedule."""

    prediction_type: Prediction
    scheduler_config: dict[str, Any]
    alphas_cumprod: Tensor  # T, fp32, on the device that trains
    guidance = "classifier_free"  # how the model is guided when it draws; see `flow.FlowObjective`

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any], prediction_type: Prediction) -> Objective:
        """The objective of a diffusers scheduler config; `prediction_type` overrides the config's own."""
        config = dict(scheduler_config) | {"prediction_type": prediction_type}
        return cls(prediction_type, config, schedule(config).float())

    def to(self, device: torch.device | str) -> Objective:
        """The same with its table on `device`, so that a step need not wait for the host."""
        return Objective(self.prediction_type, self.scheduler_config, self.alphas_cumprod.to(device))

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def draw(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str,
        dtype: torch.dtype,
        offset_noise: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Noise (b c h w) and timesteps (b), each sample a function of its 63-bit seed and the kind of device.

        `shape` is one sample's (c h w). Drawn in fp32 on `device`, then cast. `offset_noise` scales a
        shift of whole channels, drawn last so that it changes nothing else.
        """
        generator = torch.Generator(device)
        noises, timesteps = [], []
        for seed in seeds:
            generator.manual_seed(seed)
            timesteps.append(torch.randint(self.num_timesteps, (1,), generator=generator, device=device))
            noises.append(draw_noise(shape, generator, device, offset_noise))
        return torch.stack(noises).to(dtype), torch.cat(timesteps)

    def _signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1-ᾱ_t), shaped to multiply `like` (b …), computed in the table's precision."""
        alphas = self.alphas_cumprod.to(like.device)[timesteps].view(-1, *[1] * (like.ndim - 1))
        return alphas.sqrt().to(like.dtype), (1.0 - alphas).sqrt().to(like.dtype)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, b c h w; Ho et al. 2006.11239, eq. 4."""
        signal, sigma = self._signal_and_noise(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """ε, or v = √ᾱ_t ε - √(1-ᾱ_t) x_0, b c h w; Salimans & Ho 2202.00512, §4."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_and_noise(timesteps, latents)
        return signal * noise - sigma * latents

    def loss_weight(self, timesteps: Tensor, snr_gamma: float) -> Tensor:
        """Weight of each sample's loss (b, fp32); `snr_gamma` 0 weighs all alike."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps]
        if snr_gamma == 0:
            return torch.ones_like(alphas)
        return min_snr_weight(snr(alphas), snr_gamma, self.prediction_type)

    def quantile_timesteps(self, q: int) -> list[int]:
        """The middle timestep of each of `q` equal parts of the schedule, rising; validation repeats them."""
        return [int((i + 0.5) * self.num_timesteps / q) for i in range(q)]
