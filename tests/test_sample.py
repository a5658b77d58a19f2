"""Sampling: the solver finds the data of an exact denoiser, pictures follow their seeds, guidance does its sum."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import models
from trainer import sample
from trainer.families import sd15
from trainer.objective import Objective
from trainer.sample import guided, initial_noise

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    base = sd15.open_base(str(models.sd15_folder(tmp_path_factory.mktemp("tiny") / "base", "v_prediction", True)))
    encoder = sd15.load_text_encoder(base, "cpu", torch.float32)
    return SimpleNamespace(
        base=base,
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
    latents = sample.draw(sd15, tiny.denoiser, tiny.objective, seeds=seeds, **(settings | changes))
    return [np.asarray(picture) for picture in sample.decode(sd15, tiny.vae, latents)]


def exact_family(objective, data):
    """A family whose denoiser knows that all data is `data`."""

    def predict(denoiser, noisy, timesteps, conditioning):
        alphas = objective.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - alphas.sqrt() * data) / (1 - alphas).sqrt()
        return objective.target(data.expand_as(noisy), noise, timesteps)

    shape = data.shape
    return SimpleNamespace(predict=predict, latent_shape=lambda w, h: shape)


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_an_exact_denoiser_leads_to_its_data(prediction, zero_snr):
    objective = Objective.from_config(SD15 | (models.ZERO_SNR if zero_snr else {}), prediction)
    data = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    family = exact_family(objective, data)
    empty = {"prompt_embeds": torch.zeros(1, 1, 1)}
    both = {"prompt_embeds": torch.zeros(2, 1, 1)}
    (latents,) = sample.draw(
        family, None, objective, conditioning=both, negative=empty, seeds=[1, 2], steps=10, guidance=3.0,
        width=64, height=64, device="cpu", dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(latents, data.expand(2, -1, -1, -1), atol=2e-3, rtol=0)


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("something else")])
def test_a_picture_too_large_for_the_memory_is_decoded_in_tiles(tiny, error):
    """On a GPU that has room for 64 x 64 latents at once."""
    seen = []

    def decode(z):
        seen.append(tuple(z.shape[-2:]))
        if max(z.shape[-2:]) > sample.TILE // 8:
            raise error
        return SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    vae = sd15.load_vae(tiny.base, "cpu", torch.float32)
    family = SimpleNamespace(decode_latents=sd15.decode_latents)
    vae.decoder.forward = lambda z, *rest: decode(z).sample
    vae.post_quant_conv = torch.nn.Identity()
    latents = torch.randn(1, 4, 80, 72, generator=torch.Generator().manual_seed(0))
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="something else"):
            list(sample.decode(family, vae, [latents]))
        return
    first, second = sample.decode(family, vae, [latents, latents])
    assert first.size == (576, 640) and list(first.getdata()) == list(second.getdata())
    assert seen[0] == (80, 72) and all(max(size) <= 64 for size in seen[1:])


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
