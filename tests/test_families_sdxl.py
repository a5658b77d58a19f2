"""SDXL: folder and single file are one model, conditioned as diffusers does it, and runs end in a file that fits."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests import family_runs, models, models_sdxl, projects
from trainer.data.order import Draw
from trainer.errors import UserError
from trainer.families import sdxl
from trainer.material import framing

LOADERS = (sdxl.load_text_encoder, sdxl.load_vae, sdxl.load_denoiser)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models_sdxl.folder(tmp_path_factory.mktemp("sdxl") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder):
    return [load(sdxl.open_base(str(folder)), "cpu", torch.float32) for load in LOADERS]


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def preset(folder, tmp_path_factory):
    return family_runs.project(tmp_path_factory.mktemp("project"), "sdxl", folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


def open_file(file, folder, **options):
    return sdxl.open_base(str(file), tokenizer=str(folder / "tokenizer"), tokenizer_2=str(folder / "tokenizer_2"),
                          **options)


def assert_same(modules, others):
    for module, other in zip(modules, others, strict=True):
        expected, found = module.state_dict(), other.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_single_file_holds_the_same_model_as_its_folder(folder, loaded, tmp_path):
    base = open_file(models_sdxl.single_file(tmp_path / "tiny.safetensors", folder), folder)
    assert_same(loaded, [load(base, "cpu", torch.float32) for load in LOADERS])
    for key in ("attention_head_dim", "transformer_layers_per_block", "block_out_channels", "down_block_types"):
        assert list(base.parts["unet"].config[key]) == list(loaded[2].config[key]), key


def test_text_encoders_and_vae_can_be_files_of_their_own(folder, loaded, tmp_path):
    whole = load_file(models_sdxl.single_file(tmp_path / "whole.safetensors", folder))
    places = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
              "l": "conditioner.embedders.0.transformer.", "g": "conditioner.embedders.1.model."}
    for name, prefix in places.items():
        part = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
        save_file(part, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="has no second text encoder: give CLIP bigG .* as model.text_encoder_2"):
        open_file(tmp_path / "unet.safetensors", folder, vae=str(tmp_path / "vae.safetensors"),
                  text_encoder=str(tmp_path / "l.safetensors"))
    base = open_file(tmp_path / "unet.safetensors", folder, vae=str(tmp_path / "vae.safetensors"),
                     text_encoder=str(tmp_path / "l.safetensors"), text_encoder_2=str(tmp_path / "g.safetensors"))
    assert_same(loaded, [load(base, "cpu", torch.float32) for load in LOADERS])


def test_prompts_are_encoded_as_in_diffusers_and_long_ones_in_chunks(loaded, pipeline):
    found = sdxl.encode_prompts(loaded[0], ["a red house"])
    embeds, _, pooled, _ = pipeline.encode_prompt("a red house", do_classifier_free_guidance=False)
    torch.testing.assert_close(found["prompt_embeds"], embeds)
    torch.testing.assert_close(found["pooled"], pooled)
    long = sdxl.encode_prompts(loaded[0], ["a red house " + "x" * 100])
    assert long["prompt_embeds"].shape == (1, 154, 192) and sdxl.prompt_chunks(loaded[0], "x" * 100) == 2


def test_the_unet_sees_the_framing_and_by_default_a_whole_picture(loaded, pipeline):
    text, noisy, step = sdxl.encode_prompts(loaded[0], ["a house"]), torch.randn(1, 4, 8, 6), torch.tensor([300])
    for conditioning, ids in (({}, [64, 48, 0, 0, 64, 48]), ({"framing": [512, 300, 7, 3, 64, 48]}, None)):
        ids = torch.tensor([ids or conditioning["framing"]], dtype=torch.float32)
        conditioning = {name: ids for name in conditioning}
        added = {"text_embeds": text["pooled"], "time_ids": ids}
        expected = pipeline.unet(noisy, step, text["prompt_embeds"], added_cond_kwargs=added).sample
        torch.testing.assert_close(sdxl.predict(loaded[2], noisy, step, text | conditioning), expected)


def test_a_draws_framing_is_that_of_its_crop(preset, workspace):
    session = projects.session(preset, workspace, *family_runs.SMALL, "data.crop=random", name="framing")
    store = session.latents
    item = next(i for i, size in enumerate(store.sizes) if store.items[i].width == 96)
    left, top = store.offsets[item][1]
    width, height = store.sizes[item]
    plain, mirrored = framing(store, [Draw(item, 0, 1, flip, 0) for flip in (False, True)])
    assert plain.tolist() == [48, 96, top, left, height, width]
    covered = max(width, round(96 * max(width / 96, height / 48)))
    assert mirrored.tolist() == [48, 96, top, covered - width - left, height, width]


def test_zero_terminal_snr_and_v_come_from_the_base(folder, tmp_path):
    base = sdxl.open_base(str(models_sdxl.folder(tmp_path / "v", "v_prediction", zero_snr=True)))
    assert sdxl.objective(base).prediction_type == "v_prediction" and sdxl.objective(base).alphas_cumprod[-1] == 0
    marks = {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}
    marked = open_file(models_sdxl.single_file(tmp_path / "v.safetensors", folder, extra=marks), folder)
    assert sdxl.objective(marked).prediction_type == "v_prediction" and sdxl.objective(marked).alphas_cumprod[-1] == 0


def test_an_sdxl_file_under_an_sd15_preset_is_named(folder, tmp_path):
    from trainer.families import sd15

    file = models_sdxl.single_file(tmp_path / "tiny.safetensors", folder)
    with pytest.raises(UserError, match="is an SDXL model, and model.family = 'sd15' needs an SD 1.5 model: set model"):
        sd15.open_base(str(file))
    with pytest.raises(UserError, match="is an SD 1.5 model, and model.family = 'sdxl' needs an SDXL model"):
        sdxl.open_base(str(models.sd15_folder(tmp_path / "sd15")))


def test_the_shipped_configs_are_of_the_true_sizes():
    def on_meta(build, name):
        with torch.device("meta"):
            return build(json.loads((sdxl._CONFIGS / f"{name}.json").read_text()))

    unet = on_meta(UNet2DConditionModel.from_config, "unet")
    vae = on_meta(AutoencoderKL.from_config, "vae")
    first = on_meta(lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)), "text_encoder")
    second = on_meta(lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)), "text_encoder_2")
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (unet, vae, first, second)]
    assert counts == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert len(sdxl.adapter_targets({"unet": unet}, ["attention", "feed_forward", "projection"])) == 722


@pytest.mark.parametrize("method", family_runs.METHODS)
def test_a_run_trains_resumes_exactly_samples_and_fits_diffusers(preset, workspace, folder, method):
    overrides = [f"adapter.method={method}"]
    if method == "lora":
        overrides.append('adapter.targets=["attention", "text_encoder"]')
    run = family_runs.train(preset, workspace, method, *overrides)
    family_runs.assert_finished(run)
    family_runs.assert_resume_is_exact(run)
    if method in ("lora", "stella"):  # that the file says what was trained is `assert_finished`'s
        pipe = family_runs.assert_diffusers_has_our_weights(run, preset, folder, "unet", *overrides, layers=136)
    if method == "lora":
        for encoder in (pipe.text_encoder, pipe.text_encoder_2):
            assert sum(hasattr(module, "lora_A") for module in encoder.modules()) == 18
