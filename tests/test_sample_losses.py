"""Losses of single samples, by noise level and by image."""

from __future__ import annotations

import math

import pytest

from trainer.sample_losses import MEMORY, SampleLosses


def test_losses_are_told_by_ten_noise_levels() -> None:
    samples = SampleLosses(["a", "b"], 1000, every=1)
    samples.add([0, 1, 0, 1], [1.0, 3.0, 5.0, 7.0], [0, 99, 100, 999])
    samples.add([0], [9.0], [1000.0])  # pure noise itself, which flow models may draw
    told = samples.report()
    assert told["timesteps"] == {"loss": [2.0, 5.0, *[None] * 7, 8.0], "count": [2, 1, *[0] * 7, 2]}


def test_an_image_is_compared_with_the_others_of_the_same_noise_level() -> None:
    samples = SampleLosses(["easy", "hard"], 10, every=1)
    samples.add([0, 1, 0, 1], [1.0, 3.0, 10.0, 30.0], [0, 0, 9, 9])  # three times as hard at each level
    assert samples.report()["image_loss"] == {"images": {"easy": [2, 0.5], "hard": [2, 1.5]}}


def test_an_image_is_compared_with_what_came_before_too_and_old_samples_fade() -> None:
    samples = SampleLosses(["before", "now"], 10, every=1)
    samples.add([0] * MEMORY, [1.0] * MEMORY, [5.0] * MEMORY)
    samples.report()
    samples.add([1], [4.0], [5.0])
    assert samples.report()["image_loss"]["images"] == {"now": [1, pytest.approx(4.0, rel=0.01)]}
    for _ in range(10):
        samples.add([1] * MEMORY, [4.0] * MEMORY, [5.0] * MEMORY)
        ratio = samples.report()["image_loss"]["images"]["now"][1]
    assert ratio == pytest.approx(1.0, abs=0.01)


def test_regularisation_images_and_losses_that_are_no_numbers_do_not_count() -> None:
    samples = SampleLosses([None, "a"], 10, every=1)
    samples.add([0, 1, 1], [100.0, math.nan, 2.0], [0, 0, 0])
    assert samples.report() == {"timesteps": {"loss": [2.0, *[None] * 9], "count": [1, *[0] * 9]},
                                "image_loss": {"images": {"a": [1, 1.0]}}}
    assert samples.report() == {}


def test_a_loss_of_zero_is_no_fault() -> None:
    samples = SampleLosses(["a"], 10, every=1)
    samples.add([0], [0.0], [0])
    assert samples.report()["image_loss"]["images"] == {"a": [1, 1.0]}
