"""The best checkpoint, with its reason, and when no gain is left."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainer.best import Best, choose, steps_without_gain

LOSSES = {0: 0.05, 100: 0.5, 200: 0.4, 300: 0.45}
SAVED = [100, 200, 300]


def kid(step: int, value: float, reach: float, **other: Any) -> dict[str, Any]:
    return {"kind": "distance", "step": step, "kid": value, "kid_low": value - reach, "kid_high": value + reach,
            "extractor": "efflite0", "n_ref": 48, "n_gen": 24} | other


def test_the_lowest_validation_loss_of_what_is_saved_wins() -> None:
    best = choose(SAVED, LOSSES, {}, [])
    assert best == Best(200, "validation", 0.4, "its validation loss is the lowest, 12.5% below step 300's")
    assert best.fields() == {"step": 200, "by": "validation", "value": 0.4, "why": best.why}
    assert choose([300], LOSSES, {}, []).why == "it is the only checkpoint with a validation loss"
    assert choose([400], LOSSES, {}, []) is None
    assert choose([1, 2], {1: math.nan, 2: 0.7}, {}, []).step == 2


def test_a_difference_within_the_noise_of_the_images_is_said() -> None:
    sure = {200: [0.3, 0.5, 0.4], 300: [0.35, 0.55, 0.45]}  # each image is lower by the same
    unsure = {200: [0.1, 0.7, 0.4], 300: [0.5, 0.35, 0.5]}
    assert choose(SAVED, LOSSES, sure, []).why.endswith("12.5% below step 300's")
    assert choose(SAVED, LOSSES, unsure, []).why.endswith("step 300's, which is within the noise of 3 images")
    assert choose([1, 2], {1: 0.5, 2: 0.5}, {}, []).why == "its validation loss is the lowest, as low as step 2's"


def test_kid_decides_only_when_its_interval_is_apart() -> None:
    apart = choose(SAVED, LOSSES, {}, [kid(100, 5.0, 0.5), kid(200, 9.0, 0.5), kid(300, 7.0, 0.5)])
    assert (apart.step, apart.by, apart.value, apart.low, apart.high) == (100, "kid", 5.0, 4.5, 5.5)
    assert apart.why == ("its KID is the lowest, and its interval apart from all others; the validation loss is "
                         "lowest at 200")
    assert apart.fields()["low"] == 4.5
    near = choose(SAVED, LOSSES, {}, [kid(100, 5.0, 0.5), kid(200, 9.0, 0.5), kid(300, 5.5, 0.5)])
    assert (near.step, near.by) == (200, "validation") and near.why.endswith("; the KIDs lie within each other's noise")


def test_one_kid_alone_or_measured_otherwise_tells_nothing_against_a_loss() -> None:
    assert choose(SAVED, LOSSES, {}, [kid(300, 5.0, 0.5)]).by == "validation"
    other = [kid(100, 1.0, 0.1, n_gen=8), kid(300, 5.0, 0.5)]  # fewer pictures: not to be compared
    assert choose(SAVED, LOSSES, {}, other).by == "validation"
    assert choose(SAVED, {}, {}, [kid(300, 5.0, 0.5)]).why == "it is the only checkpoint with a KID"
    assert choose(SAVED, {}, {}, [kid(300, 5.0, 0.5), kid(200, 5.1, 0.5)]).why.endswith("within the noise of others")
    assert choose(SAVED, LOSSES, {}, [kid(300, 5.0, 0.5) | {"kid": None}]).by == "validation"


@pytest.mark.parametrize(("losses", "since", "count", "best"), [
    ({0: 1.0, 1: 0.5, 2: 0.6, 3: 0.7}, 0, 2, 1), ({0: 1.0, 1: 0.5, 2: 0.6, 3: 0.7}, 2, 1, 1),
    ({0: 1.0, 1: 0.9}, 0, 0, 1), ({0: 1.0, 1: 1.0, 2: 1.0}, 0, 2, 0), ({}, 0, 0, None),
    ({0: 1.0, 1: math.nan, 2: math.nan}, 0, 2, 0), ({1: math.nan}, 0, 1, None)])
def test_validations_without_a_gain_are_counted(losses: dict[int, float], since: int, count: int,
                                                best: int | None) -> None:
    assert steps_without_gain(losses, since) == (count, best)
