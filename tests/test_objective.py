"""The objective against its papers' formulas in fp64, and the independence of each sample's draw."""

import math

import pytest
import torch

from trainer.objective import Objective, min_snr_weight, per_sample_loss, pixel_weights, schedule

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")


def expected_alphas() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def test_schedule_is_the_cumulated_product_of_the_betas():
    torch.testing.assert_close(schedule(SD15), expected_alphas(), rtol=1e-4, atol=0)


def test_zero_terminal_snr_keeps_the_first_level_and_empties_the_last():
    alphas = schedule(SD15 | {"rescale_betas_zero_snr": True})
    root = expected_alphas().sqrt()
    rescaled = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(alphas, rescaled**2, rtol=1e-3, atol=1e-7)
    assert alphas[-1] == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noisy_latents_and_target_follow_the_formulas(prediction):
    objective = Objective.from_config(SD15, prediction)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    timesteps = torch.tensor([0, 500, 999])
    alphas = objective.alphas_cumprod.double()[timesteps].view(3, 1, 1, 1)
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    target = noise if prediction == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    torch.testing.assert_close(objective.add_noise(latents, noise, timesteps), noisy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(objective.target(latents, noise, timesteps), target, rtol=1e-6, atol=1e-6)


def test_at_zero_snr_the_input_is_noise_and_the_velocity_is_minus_the_image():
    objective = Objective.from_config(SD15 | {"rescale_betas_zero_snr": True}, "v_prediction")
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    last = torch.tensor([999])
    assert torch.equal(objective.add_noise(latents, noise, last), noise)
    assert torch.equal(objective.target(latents, noise, last), -latents)


def test_half_precision_latents_stay_half():
    objective = Objective.from_config(SD15, "v_prediction")
    latents, noise = torch.randn(2, 1, 4, 8, 8).bfloat16()
    assert objective.add_noise(latents, noise, torch.tensor([10])).dtype == torch.bfloat16
    assert objective.target(latents, noise, torch.tensor([10])).dtype == torch.bfloat16


def test_min_snr_weights():
    snr = torch.tensor([0.0, 0.5, 5.0, 50.0], dtype=torch.float64)
    assert min_snr_weight(snr, 5.0, "epsilon").tolist() == [1, 1, 1, 0.1]
    expected = [0, 0.5 / 1.5, 5 / 6, 5 / 51]
    assert min_snr_weight(snr, 5.0, "v_prediction").tolist() == pytest.approx(expected)


def test_loss_weight_without_gamma_is_one():
    objective = Objective.from_config(SD15, "epsilon")
    assert objective.loss_weight(torch.tensor([0, 999]), 0.0).tolist() == [1.0, 1.0]
    alpha = objective.alphas_cumprod[0].item()
    weight = objective.loss_weight(torch.tensor([0]), 5.0).item()
    assert math.isclose(weight, 5 / (alpha / (1 - alpha)), rel_tol=1e-3)


def test_loss_is_one_number_a_sample_in_fp32():
    prediction = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]]).bfloat16()
    loss = per_sample_loss(prediction, torch.zeros(2, 1, 2))
    assert loss.tolist() == [5.0, 0.0] and loss.dtype == torch.float32


def test_huber_is_square_below_delta_and_straight_above():
    loss = per_sample_loss(torch.tensor([[0.05], [2.0]]), torch.zeros(2, 1), "huber", delta=0.1)
    torch.testing.assert_close(loss, torch.tensor([0.05**2, 2 * 0.1 * (2.0 - 0.05)]))


def test_a_draw_depends_on_its_own_seed_only():
    objective = Objective.from_config(SD15, "epsilon")
    seeds = [2**63 - 1, 0, 12345678901234567]
    noise, timesteps = objective.draw(seeds, (4, 8, 6), CPU, torch.float32)
    assert noise.shape == (3, 4, 8, 6) and timesteps.shape == (3,)
    for i, seed in enumerate(seeds):
        alone, timestep = objective.draw([seed], (4, 8, 6), CPU, torch.float32)
        assert torch.equal(alone[0], noise[i]) and timestep == timesteps[i]


def test_a_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    Objective.from_config(SD15, "epsilon").draw([1], (4, 8, 8), CPU, torch.float32)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_are_normal_and_timesteps_uniform():
    noise, timesteps = Objective.from_config(SD15, "epsilon").draw(range(4000), (2, 4, 4), CPU, torch.float32)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert timesteps.min() < 5 and timesteps.max() > 994
    assert abs(timesteps.float().mean() - 499.5) < 20


def test_offset_noise_shifts_whole_channels_and_nothing_else():
    objective = Objective.from_config(SD15, "epsilon")
    plain, timesteps = objective.draw([7], (4, 8, 8), CPU, torch.float32)
    shifted, same = objective.draw([7], (4, 8, 8), CPU, torch.float32, offset_noise=0.1)
    shift = (shifted - plain)[0].flatten(1)
    assert torch.equal(timesteps, same)
    assert torch.allclose(shift, shift[:, :1], atol=1e-6) and shift.abs().max() > 0.01


def test_quantile_timesteps_are_the_middles():
    assert Objective.from_config(SD15, "epsilon").quantile_timesteps(4) == [125, 375, 625, 875]


# Masks


def test_a_mask_weighs_places_and_keeps_each_samples_mean():
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2, :2] = 1
    weights = pixel_weights(mask, 0.2)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(weights[0, 0, 0, 0] / weights[0, 0, 3, 3], torch.tensor(5.0))
    for even in (torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)):  # all masked in, or all background
        torch.testing.assert_close(pixel_weights(even, 0.1), torch.ones(1, 1, 4, 4))


def test_no_place_of_a_tiny_mask_outweighs_ten_and_an_empty_one_learns_nothing():
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, 0, 0, 0] = 1
    weights = pixel_weights(mask, 0.0)
    torch.testing.assert_close(weights.amax((1, 2, 3)), torch.tensor([10.0, 0.0]))


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_the_loss_does_not_look_outside_of_a_mask(kind):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    target = torch.randn(2, 3, 4, 4, generator=generator)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, 1:3, 1:3] = 1
    loss = per_sample_loss(prediction, target, kind, weights=pixel_weights(mask, 0.0))
    inside = mask.expand_as(target).bool()
    masked = [per_sample_loss(prediction[i][inside[i]][None], target[i][inside[i]][None], kind) for i in range(2)]
    torch.testing.assert_close(loss, torch.cat(masked))
    gradient, = torch.autograd.grad(loss.sum(), prediction)
    assert gradient[inside].ne(0).all() and gradient[~inside].eq(0).all()
