"""Student's t distribution for whole degrees of freedom, without a statistics library."""

from __future__ import annotations

from math import atan, cos, pi, sin, sqrt

PRECISION = 1e-10  # of a quantile, relative


def within(t: float, freedom: int) -> float:
    """The probability that |T| ≤ t (t ≥ 0): Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    angle = atan(t / sqrt(freedom))
    square = cos(angle) ** 2
    term, total = 1.0, 0.0
    if freedom % 2 == 0:
        for k in range(freedom // 2):
            total += term
            term *= square * (2 * k + 1) / (2 * k + 2)
        return sin(angle) * total
    term = cos(angle)
    for k in range((freedom - 1) // 2):
        total += term
        term *= square * (2 * k + 2) / (2 * k + 3)
    return 2 / pi * (angle + sin(angle) * total)


def quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| ≤ t) = confidence, as an interval of that confidence needs it; 0 < confidence < 1."""
    low, high = 0.0, 1.0
    while within(high, freedom) < confidence:
        low, high = high, 2 * high
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < confidence else (low, middle)
    return high
