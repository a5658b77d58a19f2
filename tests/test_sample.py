"""Sampling: the solver finds the data of an exact denoiser, pictures follow their seeds, guidance does its sum."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import models
from trainer.families import sd15
from trainer.objective import Objective
from trainer.sample import guided, initial_noise, sample

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    base = sd15.open_base(str(models.sd15_folder(tmp_path_factory.mktemp("tiny") / "base", "v_prediction", True)))
    encoder = sd15.load_text_encoder(base, "cpu", torch.float32)
    return SimpleNamespace(
        denoiser=sd15.load_denoiser(base, "cpu", torch.float32),
        vae=sd15.load_vae(base, "cpu", torch.float32),
        objective=sd15.objective(base),
        prompts=sd15.encode_prompts(encoder, ["a cat", "a dog", "a house"]),
        negative=sd15.encode_prompts(encoder, [""]),
    )


def draw(tiny, seeds, **changes):
    prompts = {name: value[: len(seeds)] for name, value in tiny.prompts.items()}
    settings = {
        "conditioning": prompts,
        "negative": tiny.negative,
        "steps": 2,
        "guidance": 4.0,
        "width": 64,
        "height": 48,
        "device": "cpu",
        "dtype": torch.float32,
    }
    pictures = sample(sd15, tiny.denoiser, tiny.vae, tiny.objective, seeds=seeds, **(settings | changes))
    return [np.asarray(picture) for picture in pictures]


def exact_family(objective, data):
    """A family whose denoiser knows that all data is `data`, and whose VAE keeps what it is to decode."""

    def predict(denoiser, noisy, timesteps, conditioning):
        alphas = objective.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - alphas.sqrt() * data) / (1 - alphas).sqrt()
        return objective.target(data.expand_as(noisy), noise, timesteps)

    decoded = []

    def decode_latents(vae, latents):
        decoded.append(latents)
        return torch.zeros(len(latents), 8, 8, 3, dtype=torch.uint8)

    shape = data.shape
    return SimpleNamespace(predict=predict, decode_latents=decode_latents, latent_shape=lambda w, h: shape), decoded


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_an_exact_denoiser_leads_to_its_data(prediction, zero_snr):
    objective = Objective.from_config(SD15 | (models.ZERO_SNR if zero_snr else {}), prediction)
    data = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    family, decoded = exact_family(objective, data)
    empty = {"prompt_embeds": torch.zeros(1, 1, 1)}
    both = {"prompt_embeds": torch.zeros(2, 1, 1)}
    pictures = sample(
        family, None, None, objective, conditioning=both, negative=empty, seeds=[1, 2], steps=10, guidance=3.0,
        width=64, height=64, device="cpu", dtype=torch.float32,
    )  # fmt: skip
    assert len(list(pictures)) == 2
    torch.testing.assert_close(decoded[0], data.expand(2, -1, -1, -1), atol=2e-3, rtol=0)


def test_pictures_have_the_size_asked_for_and_repeat_by_seed(tiny):
    first, second = draw(tiny, [1, 2])
    assert first.shape == (48, 64, 3) and first.dtype == np.uint8
    again = draw(tiny, [1, 2])
    assert np.array_equal(first, again[0]) and np.array_equal(second, again[1])
    assert not np.array_equal(first, draw(tiny, [3])[0])


def test_a_picture_does_not_depend_on_its_batch(tiny):
    together = draw(tiny, [1, 2, 3])
    apart = draw(tiny, [1, 2, 3], batch_size=1)
    for one, other in zip(together, apart, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_sampling_stops_when_asked_and_keeps_what_is_done(tiny):
    asked = iter([False, False, True])
    assert len(draw(tiny, [1, 2, 3], batch_size=1, should_stop=lambda: next(asked))) == 1


def test_sampling_leaves_no_graph_and_no_inference_tensors(tiny):
    draw(tiny, [1])
    weight = tiny.denoiser.conv_in.weight
    assert not weight.is_inference() and torch.is_grad_enabled()


def test_guidance_pushes_away_from_the_negative_prompt():
    def predict(noisy, timesteps, conditioning):
        return noisy * conditioning["prompt_embeds"].mean((1, 2)).view(-1, 1, 1, 1)

    noisy, timestep = torch.ones(2, 1, 2, 2), torch.tensor(5)
    toward = {"prompt_embeds": torch.full((2, 77, 3), 2.0)}
    away = {"prompt_embeds": torch.full((2, 77, 3), 0.5)}
    longer = {"prompt_embeds": torch.full((2, 154, 3), 2.0)}
    assert torch.equal(guided(predict, noisy, timestep, toward, away, 4.0), torch.full((2, 1, 2, 2), 6.5))
    assert torch.equal(guided(predict, noisy, timestep, longer, away, 4.0), torch.full((2, 1, 2, 2), 6.5))
    assert torch.equal(guided(predict, noisy, timestep, toward, away, 1.0), torch.full((2, 1, 2, 2), 2.0))


def test_guidance_takes_one_forward_pass():
    calls = []

    def predict(noisy, timesteps, conditioning):
        calls.append(len(noisy))
        assert len(timesteps) == len(noisy)
        return noisy

    embeds = {"prompt_embeds": torch.zeros(3, 77, 2)}
    guided(predict, torch.ones(3, 1, 2, 2), torch.tensor(5), embeds, embeds, 4.0)
    assert calls == [6]


def test_initial_noise_is_a_function_of_each_seed():
    noise = initial_noise([4, 9], (4, 8, 8), "cpu")
    assert torch.equal(noise[1], initial_noise([9], (4, 8, 8), "cpu")[0])
    assert not torch.equal(noise[0], noise[1])
