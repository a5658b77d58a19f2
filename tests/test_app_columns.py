"""The finer measures of a run as columns: thinned out without losing what they say, and whatever stands in the file."""

import json

import pytest

from app import columns


def bins(step, loss, count):
    return {"kind": "timesteps", "step": step, "loss": loss, "count": count}


def test_loss_by_noise_level_is_put_together_without_losing_the_mean():
    events = [bins(step, [float(step)] * 9 + [None], [step] * 9 + [0]) for step in range(1, 1001)]
    made = columns.bin_columns(events, thin=True)
    assert len(made["step"]) <= columns.MOST_SLICES and made["step"][-1] == 1000
    assert [sum(count[0] for count in made["count"]), made["count"][0][9], made["loss"][0][9]] == [500_500, 0, None]
    mean = sum(loss[0] * count[0] for loss, count in zip(made["loss"], made["count"])) / 500_500
    assert mean == pytest.approx(sum(step * step for step in range(1, 1001)) / 500_500, rel=1e-4)
    assert columns.bin_columns(events, thin=False)["step"] == list(range(1, 1001))


def test_bins_that_are_none_are_passed_over():
    assert columns.bin_columns([bins(1, [1.0], [1]), bins(2, None, 3), {"step": 3}], thin=True) == {}
    [loss] = columns.bin_columns([bins(1, [float("nan"), "x", True] + [1.0] * 7, [1] * 10)], thin=True)["loss"]
    assert loss[:2] == [None, None]


def test_effective_rank_by_block_keeps_the_models_order_and_thins_to_what_a_screen_shows():
    events = [{"step": step, "rank": 8, "blocks": {"up": [3.0, 2.0, 0.1], "down": [step / 7, 1.0, 0.1]}}
              for step in range(1, 1001)]
    made = columns.block_columns(events, thin=True)
    assert list(made["erank"]) == ["up", "down"] and made["step"][-1] == 1000
    assert len(made["step"]) == len(made["erank"]["up"]) <= columns.MOST_SLICES
    assert len(json.dumps(made)) < 6000
    odd = [{"step": 1, "blocks": {"up": 3, "down": []}}, {"step": 2, "blocks": [1]}, {"step": 3, "erank": {"up": 1.0}}]
    assert columns.block_columns(odd, thin=True) == {
        "step": [1], "rank": [None], "erank": {"up": [None], "down": [None]}}


def test_validation_comes_with_its_loss_at_each_noise_level():
    events = [{"step": 1, "loss": 0.5, "by_quantile": [0.1, 0.9]}, {"step": 2, "loss": 0.4}]
    assert columns.validation_columns(events, thin=True) == {
        "step": [1, 2], "loss": [0.5, 0.4], "levels": {"0": [0.1, None], "1": [0.9, None]}}
    assert columns.validation_columns(events[1:], thin=True) == {"step": [2], "loss": [0.4]}
