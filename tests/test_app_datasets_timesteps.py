"""The histogram of timesteps is the distribution that training draws from."""

import pytest
import torch

from app.datasets.timesteps import histogram
from trainer.flow import FlowObjective

DRAWN = 4000


@pytest.mark.parametrize("asked", [
    {"sampling": "uniform"}, {"sampling": "logit_normal", "mean": -0.5, "scale": 0.8}, {"sampling": "auto"},
    {"sampling": "sigmoid", "scale": 1.5}, {"sampling": "resolution", "shift": 2.0},
    {"sampling": "uniform", "shift": 3.0}])
@pytest.mark.parametrize("resolution", [512, 1024])
def test_it_is_what_the_objective_draws(asked, resolution):
    told = histogram("flux1", resolution=resolution, **asked)
    assert sum(told["shares"]) == pytest.approx(1) and len(told["edges"]) == 51
    objective = FlowObjective("embedded", "linear", 2).with_sampling(
        asked["sampling"], asked.get("mean", 0.0), asked.get("scale", 1.0), asked.get("shift", 1.0))
    side = resolution // 8
    sigmas = [objective._sigma(torch.Generator().manual_seed(seed), (16, side, side), "cpu") for seed in range(DRAWN)]
    drawn = torch.histc(torch.cat(sigmas), 50, 0, 1).cumsum(0) / DRAWN
    told_sums = torch.tensor(told["shares"]).cumsum(0)
    assert (drawn - told_sums).abs().max() < 0.035  # Kolmogorov-Smirnov at 4000 draws: one in ten thousand is beyond


def test_diffusion_families_draw_all_timesteps_alike():
    assert histogram("sdxl", "sigmoid")["shares"] == pytest.approx([0.02] * 50)
