"""Rectified flow: the path, its target, where it is trained, and how it is walked."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from trainer.flow import EulerSolver, FlowObjective
from trainer.shifts import empirical_shift, resolution_shift, shift_sigmas

FLUX1, FLUX2 = FlowObjective("embedded", "linear", patch=2), FlowObjective("classifier_free", "empirical", patch=1)


def sigmas(objective, count=4000, shape=(2, 8, 8)):
    return objective.draw(range(count), shape, "cpu", torch.float32)[1] / 1000


def test_the_path_leads_from_picture_to_noise_and_the_target_is_its_derivative():
    x, noise = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    low, high = torch.tensor([0.0, 250.0]), torch.tensor([1000.0, 750.0])
    assert torch.equal(FLUX1.add_noise(x, noise, low)[0], x[0])
    assert torch.equal(FLUX1.add_noise(x, noise, high)[0], noise[0])
    change = FLUX1.add_noise(x, noise, high) - FLUX1.add_noise(x, noise, low)
    torch.testing.assert_close(change, FLUX1.target(x, noise, low) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1))


def test_a_sample_is_a_function_of_its_seed_and_offset_noise_changes_nothing_else():
    noise, times = FLUX1.draw([5, 6], (2, 4, 4), "cpu", torch.float32)
    again, same = FLUX1.draw([6], (2, 4, 4), "cpu", torch.float32, offset_noise=0.1)
    assert times[1] == same[0] and not torch.equal(noise[1], again[0])
    difference = (again[0] - noise[1]).flatten(1)
    assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-6)


@pytest.mark.parametrize(("chosen", "median", "spread"), [
    (("uniform", 0.0, 1.0, 1.0), 0.5, 0.289),
    (("sigmoid", 0.0, 1.0, 1.0), 0.5, 0.208),
    (("sigmoid", 0.0, 0.5, 1.0), 0.5, 0.115),
    (("logit_normal", 1.0, 1.0, 1.0), 0.731, 0.179),
    (("uniform", 0.0, 1.0, 3.0), 0.75, 0.255),
])
def test_training_timesteps_are_distributed_as_chosen(chosen, median, spread):
    drawn = sigmas(FLUX1.with_sampling(*chosen))
    assert 0 < drawn.min() and drawn.max() < 1
    assert drawn.median().item() == pytest.approx(median, abs=0.02)
    assert drawn.std().item() == pytest.approx(spread, abs=0.015)


def test_timesteps_by_resolution_move_with_the_number_of_tokens():
    assert FLUX1.with_sampling("auto", 0.0, 1.0, 1.0).sampling == "resolution"
    for objective, shape in ((FLUX1, (1, 128, 128)), (FLUX2, (1, 64, 64))):  # 4096 tokens both
        expected = shift_sigmas(torch.tensor(0.5), math.exp(1.15)).item()
        assert sigmas(objective, shape=shape, count=1500).median().item() == pytest.approx(expected, abs=0.02)
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize(("tokens", "steps"), [(1024, 20), (4096, 50), (9000, 30)])
def test_the_empirical_shift_is_that_of_flux2s_authors(tokens, steps):
    assert empirical_shift(tokens, steps) == pytest.approx(math.exp(compute_empirical_mu(tokens, steps)), rel=1e-6)


def test_the_solver_walks_as_diffusers_does_and_ends_at_the_picture():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 5, 5).tolist(), mu=compute_empirical_mu(64, 5))
    solver = FLUX2.solver(5, (1, 8, 8), "cpu")
    torch.testing.assert_close(solver.timesteps, scheduler.timesteps)
    x, noise = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    latents = noise
    for time in solver.timesteps:
        latents = solver.step(noise - x, time, latents).prev_sample
    torch.testing.assert_close(latents, x)
    assert EulerSolver(torch.tensor([1.0])).timesteps.tolist() == [1000.0]


def test_quantiles_lie_in_the_middle_of_their_parts():
    assert FLUX1.quantile_timesteps(4) == [125.0, 375.0, 625.0, 875.0]
    assert FLUX1.loss_weight(torch.tensor([1.0, 2.0]), 0.0).tolist() == [1.0, 1.0]
