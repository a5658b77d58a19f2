"""Flux.2 dev: Mistral's hidden states and embedded guidance, and a run that ends in a LoRA that fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from safetensors.torch import load_file, save_file
from transformers import Mistral3ForConditionalGeneration

from tests import family_runs, models_flux
from trainer import sample
from trainer.errors import UserError
from trainer.families import flux2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models_flux.dev_folder(tmp_path_factory.mktemp("dev") / "tiny")


@pytest.fixture(scope="module")
def base(folder):
    return flux2.open_base(str(folder))


@pytest.fixture(scope="module")
def encoder(base):
    return flux2.load_text_encoder(base, "cpu", torch.float32)


@torch.no_grad()
def test_prompts_are_mistrals_states_10_20_and_30_of_the_conversation(folder, encoder):
    assert len(encoder.model.layers) == 30  # of 31
    assert encoder.text("a [IMG]cat").startswith("[system]You are an AI") and encoder.text("a [IMG]cat").endswith(
        "[user]a cat")
    whole = Mistral3ForConditionalGeneration.from_pretrained(folder / "text_encoder")
    inputs = encoder.tokenizer(encoder.text("a cat"), padding="max_length", max_length=512, return_tensors="pt")
    states = whole(**inputs, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in (10, 20, 30)], -1)
    torch.testing.assert_close(flux2.encode_prompts(encoder, ["a cat"])["prompt_embeds"], expected)


def test_split_files_need_mistrals_tokenizer(folder, encoder, tmp_path):
    files = models_flux.split_files(tmp_path, folder)
    given = {"vae": str(files["vae"]), "text_encoder": str(files["text_encoder"])}
    with pytest.raises(UserError, match="tokenizer of the text encoder is missing: give a folder"):
        flux2.open_base(str(files["transformer"]), **given)
    tensors = load_file(files["text_encoder"])  # heads are 128 wide in the true Mistral, and not to be told from shapes
    assert any(name.endswith("embed_tokens.weight") for name in tensors)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.0." not in name}, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="has no Qwen3 or Mistral text encoder"):
        flux2.open_base(str(files["transformer"]), vae=given["vae"], text_encoder=str(tmp_path / "t.safetensors"))


@torch.no_grad()
def test_pictures_are_those_of_the_pipeline_at_the_same_embedded_guidance(folder, base, encoder):
    assert flux2.objective(base).guidance == "embedded" and not base.distilled and base.notes == ()
    text = flux2.encode_prompts(encoder, ["a red house"])
    pipe = Flux2Pipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = sample.initial_noise([3], flux2.latent_shape(64, 48), "cpu")
    denoiser, vae = (load(base, "cpu", torch.float32) for load in (flux2.load_denoiser, flux2.load_vae))
    pictures = []
    for guidance in (2.5, 4.0):
        expected = pipe(prompt_embeds=text["prompt_embeds"], height=48, width=64, num_inference_steps=2,
                        guidance_scale=guidance, latents=noise, output_type="np").images[0]
        latents = sample.draw(flux2, denoiser, flux2.objective(base), conditioning=text, negative=text, seeds=[3],
                              steps=2, guidance=guidance, width=64, height=48, device="cpu", dtype=torch.float32)
        picture, = sample.decode(flux2, vae, latents)
        assert np.abs(np.asarray(picture) / 255 - expected).max() < 0.01
        pictures.append(expected)
    assert np.abs(pictures[0] - pictures[1]).max() > 0


def test_a_run_trains_resumes_exactly_samples_and_fits_diffusers(folder, tmp_path):
    preset = family_runs.project(tmp_path / "project", "flux2", folder)
    overrides = ["adapter.method=stella", "adapter.fuse_qkv=false", "adapter.target_pattern=blocks[.]1[.]"]
    run = family_runs.train(preset, tmp_path, "dev", *overrides)
    family_runs.assert_finished(run)
    family_runs.assert_resume_is_exact(run)
    family_runs.assert_diffusers_has_our_weights(run, preset, folder, "transformer", *overrides, layers=10,
                                                 without=["tokenizer", "text_encoder"])
