"""Where between picture and noise a run will train: the distribution of its timesteps, without torch."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, Literal

from trainer.shifts import resolution_shift, shift_sigmas

BINS = 50
TIMESTEPS = 1000
NODES = 20_000  # quantiles that the distribution is made of
TOKEN = 16  # pixels, the side of what one token stands for
FLOW = ("flux1", "flux2")

Sampling = Literal["auto", "uniform", "logit_normal", "sigmoid", "resolution"]


def histogram(family: str, sampling: Sampling = "auto", mean: float = 0.0, scale: float = 1.0, shift: float = 1.0,
              resolution: int = 512) -> dict[str, Any]:
    """The share of samples in each of 50 equal parts of the path, 0 the picture and 1000 the noise.

    The settings are those of train.timestep_* in a preset; diffusion families draw all timesteps alike.  For
    "resolution" the shift is that of a square picture.
    """
    counts = [0] * BINS
    for node in range(NODES):
        sigma = _sigma((node + 0.5) / NODES, family, sampling, mean, scale, shift, resolution)
        counts[min(BINS - 1, int(sigma * BINS))] += 1
    return {"edges": [TIMESTEPS * i / BINS for i in range(BINS + 1)], "shares": [count / NODES for count in counts]}


def _sigma(quantile: float, family: str, sampling: Sampling, mean: float, scale: float, shift: float,
           resolution: int) -> float:
    """The noise level below which that share of all samples lies; as `FlowObjective` draws it."""
    if family not in FLOW:
        return quantile
    chosen = "resolution" if sampling == "auto" else sampling
    if chosen == "uniform":
        return shift_sigmas(quantile, shift)
    normal = NormalDist().inv_cdf(quantile) * scale + (mean if chosen == "logit_normal" else 0.0)
    sigma = 1 / (1 + math.exp(-normal))
    if chosen == "resolution":
        sigma = shift_sigmas(sigma, resolution_shift((resolution // TOKEN) ** 2))
    return shift_sigmas(sigma, shift)
