"""How rectified flow moves its noise levels σ towards the noise: plain arithmetic, for tensors and for numbers."""

from __future__ import annotations

import math
from typing import Any, TypeVar

Sigmas = TypeVar("Sigmas", bound=Any)


def shift_sigmas(sigmas: Sigmas, shift: float) -> Sigmas:
    """s σ / (1 + (s - 1) σ): more of the path near the noise for s > 1; Esser et al. 2403.03206, eq. 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_shift(tokens: int) -> float:
    """Flux's shift for so many image tokens: e^µ, µ linear from 0.5 at 256 tokens to 1.15 at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def empirical_shift(tokens: int, steps: int) -> float:
    """Flux.2's shift for sampling in `steps` steps, as its authors fitted it: e^µ, µ from 10 steps' to 200 steps'."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(many)
    few = 8.73809524e-05 * tokens + 1.89833333
    return math.exp(many + (few - many) * (200 - steps) / 190)
