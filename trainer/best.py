"""Says which of a run's checkpoints is the best, why, and whether the others are any worse; and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal

from trainer.events import Event
from trainer.student import quantile

CONFIDENCE = 0.95
COUNTED = ("extractor", "resize", "n_ref", "n_gen")  # what two KIDs must have in common to be compared


@dataclass(frozen=True)
class Best:
    """The fields of a `best` event; low and high bound KID with 95 %."""

    step: int
    by: Literal["validation", "kid"]
    value: float
    why: str
    low: float | None = None
    high: float | None = None

    def fields(self) -> dict[str, Any]:
        interval = {} if self.low is None else {"low": self.low, "high": self.high}
        return {"step": self.step, "by": self.by, "value": self.value, **interval, "why": self.why}


def choose(saved: Collection[int], losses: Mapping[int, float], by_image: Mapping[int, Sequence[float]],
           distances: Sequence[Event]) -> Best | None:
    """The best of the saved checkpoints; None when nothing was measured of any.

    KID decides where one checkpoint's interval lies below all others'; the validation loss does otherwise.

    losses, by_image: validation losses by step, also those of each held-out image; distances: `distance` events.
    """
    kids = _kids(saved, distances)
    lowest = min(kids, key=lambda step: kids[step][0], default=None)
    measured = {step: losses[step] for step in saved if math.isfinite(losses.get(step, math.nan))}
    by_loss = _by_loss(measured, by_image)
    if lowest is None or (len(kids) == 1 and by_loss is not None):
        return by_loss
    value, low, high = kids[lowest]
    others = [kids[step] for step in kids if step != lowest]
    if all(high < other_low for _, other_low, _ in others):
        return Best(lowest, "kid", value, _why_kid(lowest, by_loss, bool(others)), low, high)
    if by_loss is None:
        return Best(lowest, "kid", value, "its KID is the lowest, but within the noise of others", low, high)
    return Best(by_loss.step, "validation", by_loss.value, f"{by_loss.why}; the KIDs lie within each other's noise")


def steps_without_gain(losses: Mapping[int, float], since: int) -> tuple[int, int | None]:
    """How many validations after step `since` brought no new best, and the step of the best; None without any."""
    known = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    best = min(sorted(known), key=known.__getitem__, default=None)
    return sum(1 for step in losses if step > max(since, -1 if best is None else best)), best


def _kids(saved: Collection[int], distances: Sequence[Event]) -> dict[int, tuple[float, float, float]]:
    """KID, low and high by step, of saved checkpoints that were measured as the newest was."""
    fields = ("kid", "kid_low", "kid_high")
    whole = [event for event in distances
             if all(isinstance(event.get(key), (int, float)) for key in (*fields, "step"))]
    return {event["step"]: (event["kid"], event["kid_low"], event["kid_high"]) for event in whole
            if event["step"] in saved and all(event.get(key) == whole[-1].get(key) for key in COUNTED)}


def _by_loss(measured: Mapping[int, float], by_image: Mapping[int, Sequence[float]]) -> Best | None:
    order = sorted(measured, key=lambda step: (measured[step], step))
    if not order:
        return None
    best, *others = order
    why = "it is the only checkpoint with a validation loss"
    if others:
        why = f"its validation loss is the lowest, {_beside(best, others[0], measured, by_image)}"
    return Best(best, "validation", measured[best], why)


def _beside(best: int, other: int, measured: Mapping[int, float], by_image: Mapping[int, Sequence[float]]) -> str:
    """How it compares with the next, paired by held-out image: both saw the same images and noise."""
    gap = measured[other] - measured[best]
    share = f"{gap / measured[best]:.1%} below" if measured[best] > 0 and gap > 0 else "as low as"
    gaps = [b - a for a, b in zip(by_image.get(best, ()), by_image.get(other, ()))]
    if len(gaps) < 2:
        return f"{share} step {other}'s"
    reach = quantile(CONFIDENCE, len(gaps) - 1) * stdev(gaps) / sqrt(len(gaps))
    if fmean(gaps) > reach:
        return f"{share} step {other}'s"
    return f"{share} step {other}'s, which is within the noise of {len(gaps)} images"


def _why_kid(step: int, by_loss: Best | None, has_others: bool) -> str:
    if not has_others:
        return "it is the only checkpoint with a KID"
    why = "its KID is the lowest, and its interval apart from all others"
    return why if by_loss is None or by_loss.step == step else f"{why}; the validation loss is lowest at {by_loss.step}"
