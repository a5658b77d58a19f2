"""Flux.2: folder, whole file and split files are one model that draws as diffusers' does, and runs end in a LoRA."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3Model

from tests import family_runs, models_flux
from trainer import sample
from trainer.errors import UserError
from trainer.families import flux2, llm_text

LOADERS = (flux2.load_text_encoder, flux2.load_vae, flux2.load_denoiser)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models_flux.klein_folder(tmp_path_factory.mktemp("flux2") / "tiny")


@pytest.fixture(scope="module")
def base(folder):
    return flux2.open_base(str(folder))


@pytest.fixture(scope="module")
def loaded(base):
    return [load(base, "cpu", torch.float32) for load in LOADERS]


@pytest.fixture(scope="module")
def pipeline(folder):
    pipe = Flux2KleinPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def preset(folder, tmp_path_factory):
    return family_runs.project(tmp_path_factory.mktemp("project"), "flux2", folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


def open_file(file, folder, **options):
    return flux2.open_base(str(file), tokenizer=str(folder / "tokenizer"), **options)


def assert_same(modules, others, cast=torch.float32):
    for module, other in zip(modules, others, strict=True):
        expected, found = module.state_dict(), other.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor.to(cast).float(), found[name].float()) for name, tensor in expected.items())


def given(files):
    return {name: str(file) for name, file in files.items() if name != "transformer"}


def test_an_all_in_one_file_holds_the_same_model_as_its_folder(folder, loaded, tmp_path):
    opened = open_file(models_flux.whole_file(tmp_path / "tiny.safetensors", folder), folder)
    assert_same(loaded, [load(opened, "cpu", torch.float32) for load in LOADERS])
    config = opened.parts["transformer"].config
    for key in ("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "mlp_ratio",
                "joint_attention_dim", "in_channels", "guidance_embeds", "timestep_guidance_channels"):
        assert config[key] == loaded[2].config[key], key


@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.bfloat16), ("model.diffusion_model.", torch.float16)])
def test_comfyuis_split_files_make_a_base(folder, loaded, tmp_path, prefix, dtype):
    files = models_flux.split_files(tmp_path, folder, prefix, dtype)
    opened = open_file(files["transformer"], folder, **given(files))
    assert_same(loaded, [load(opened, "cpu", torch.float32) for load in LOADERS], cast=dtype)


def test_scaled_fp8_is_read_with_its_scales(folder, loaded, tmp_path):
    files = models_flux.split_files(tmp_path, folder)
    save_file(models_flux.fp8_scaled(load_file(files["transformer"])), files["transformer"])
    found = flux2.load_denoiser(open_file(files["transformer"], folder, **given(files)), "cpu", torch.float32)
    for name, tensor in loaded[2].state_dict().items():
        assert (found.state_dict()[name] - tensor).norm() / tensor.norm() < 0.04, name


def test_missing_and_wrong_parts_are_named(folder, tmp_path):
    files = models_flux.split_files(tmp_path, folder)
    with pytest.raises(UserError, match="has no text encoder: give its language model .*qwen_3_4b.* as model.text"):
        open_file(files["transformer"], folder, vae=str(files["vae"]))
    with pytest.raises(UserError, match="has a vocabulary of its own .264 tokens.: give its tokenizer's folder"):
        flux2.open_base(str(files["transformer"]), **given(files))
    with pytest.raises(UserError, match="has no Qwen3 or Mistral text encoder: it is a VAE alone"):
        open_file(files["transformer"], folder, **given(files) | {"text_encoder": str(files["vae"])})
    tensors = load_file(files["transformer"])
    del tensors["img_in.weight"], tensors["double_blocks.0.img_attn.norm.query_norm.scale"]
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match="has no complete transformer: the file is damaged"):
        open_file(tmp_path / "damaged.safetensors", folder, **given(files))


def test_base_or_distilled_is_told_by_the_index_the_metadata_or_the_name(folder, tmp_path):
    told = flux2.open_base(str(models_flux.klein_folder(tmp_path / "distilled", distilled=True)))
    assert told.distilled and "Train on the base" in told.notes[0]
    assert not flux2.open_base(str(folder)).distilled and flux2.open_base(str(folder)).notes == ()
    files = models_flux.split_files(tmp_path, folder)
    for name, expected in (("flux-2-klein-4b", True), ("flux-2-klein-base-4b-fp8", False), ("mine", None)):
        file = files["transformer"].rename(tmp_path / f"{name}.safetensors")
        files["transformer"] = file
        opened = open_file(file, folder, **given(files))
        assert opened.distilled == bool(expected)
        assert (expected is None) == any("nothing in this klein model says" in note for note in opened.notes)
    assert open_file(file, folder, distilled="yes", **given(files)).distilled
    save_file(load_file(file), file, {"modelspec.title": "FLUX.2-klein-9B"})
    assert open_file(file, folder, **given(files)).distilled
    clash = flux2.open_base(str(folder), distilled="yes")
    assert not clash.distilled and "model.distilled = yes is not used" in clash.notes[0]
    kinds = {flux2.objective(one).guidance for one in (told, clash)}
    assert kinds == {"none", "classifier_free"}


def test_prompts_are_encoded_as_in_diffusers_without_the_last_layers(loaded, pipeline):
    assert len(loaded[0].model.layers) == 27  # of 28: hidden states 9, 18 and 27
    embeds, _ = pipeline.encode_prompt("a red house")
    torch.testing.assert_close(flux2.encode_prompts(loaded[0], ["a red house"])["prompt_embeds"], embeds)
    assert flux2.prompt_chunks(loaded[0], "x" * 600) == 2


def test_the_tokenizer_that_ships_is_qwens():
    tokenizer = llm_text.qwen_tokenizer()
    specials = ["<|endoftext|>", "<|im_end|>", "</think>"]
    assert len(tokenizer) == 151669 and tokenizer.convert_tokens_to_ids(specials) == [151643, 151645, 151668]
    assert tokenizer("Hello world, 你好 😀").input_ids == [9707, 1879, 11, 220, 108386, 90316]
    text = llm_text.LlmText(torch.nn.Identity(), tokenizer, "qwen3").text("a cat")
    assert text == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer(text).input_ids[:3] == [151644, 872, 198]
    assert tokenizer.decode(tokenizer("naïve café — 日本語").input_ids) == "naïve café — 日本語"


@torch.no_grad()
def test_pictures_are_those_of_the_pipeline(base, loaded, pipeline):
    encoder, vae, denoiser = loaded
    noise = sample.initial_noise([3], flux2.latent_shape(64, 48), "cpu")
    expected = pipeline(prompt="a red house", height=48, width=64, num_inference_steps=3, guidance_scale=4.0,
                        latents=noise, output_type="np").images[0]
    latents = sample.draw(flux2, denoiser, flux2.objective(base), seeds=[3], steps=3, guidance=4.0, width=64, height=48,
                          conditioning=flux2.encode_prompts(encoder, ["a red house"]),
                          negative=flux2.encode_prompts(encoder, [""]), device="cpu", dtype=torch.float32)
    picture, = sample.decode(flux2, vae, latents)
    assert np.abs(np.asarray(picture) / 255 - expected).max() < 0.01


def test_latents_are_the_pipelines_normalised_ones_and_decode_back(loaded, pipeline):
    pixels = torch.rand(1, 3, 64, 48) * 2 - 1
    latents = flux2.encode_images(loaded[1], pixels)
    assert latents.shape[1:] == flux2.latent_shape(48, 64)
    torch.testing.assert_close(latents, pipeline._encode_vae_image(pixels, None))
    assert flux2.decode_latents(loaded[1], latents).shape == (1, 64, 48, 3)


@pytest.mark.parametrize(("groups", "fuse", "count"), [
    (["attention"], True, 12), (["feed_forward"], True, 8), (["single_blocks"], True, 4), (["all"], True, 20),
    (["all"], False, 28)])
def test_adapter_targets_of_a_group(loaded, groups, fuse, count):
    targets = flux2.adapter_targets({"transformer": loaded[2]}, groups, fuse)
    assert len({target.name for target in targets}) == len(targets) == count


@pytest.mark.parametrize(("sizes", "params", "layers"), [
    ((24, 5, 20, 7680), 3_876_000_000, 89), ((32, 8, 24, 12288), 9_079_000_000, 121),
    ((48, 8, 48, 15360), 32_223_000_000, 171)], ids=["klein-4b", "klein-9b", "dev"])
def test_the_shipped_configs_are_of_the_true_sizes(sizes, params, layers):
    heads, double, single, joint = sizes
    config = json.loads((flux2._CONFIGS / "transformer.json").read_text()) | {
        "num_attention_heads": heads, "num_layers": double, "num_single_layers": single, "joint_attention_dim": joint,
        "guidance_embeds": heads == 48}
    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(config)
        vae = AutoencoderKLFlux2.from_config(json.loads((flux2._CONFIGS / "vae.json").read_text()))
        text = Qwen3Model(Qwen3Config.from_dict(json.loads((flux2._CONFIGS / "qwen3.json").read_text())))
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(params, rel=2e-4)
    assert sum(weight.numel() for weight in vae.parameters()) == 84_046_115
    assert sum(weight.numel() for weight in text.parameters()) == pytest.approx(4.022e9, rel=1e-3)
    targets = flux2.adapter_targets({"transformer": model}, ["all"])
    assert len(targets) == 8 * double + 2 * single and layers > len(targets)
    assert flux2.variant_of(config | {"attention_head_dim": 128}) == {24: "klein-4b", 32: "klein-9b", 48: ""}[heads]
    assert all(re.fullmatch(r"transformer\.(single_)?transformer_blocks\.\d+\..*", target.name) for target in targets)


@pytest.mark.parametrize("method", family_runs.METHODS)
def test_a_run_trains_resumes_exactly_samples_and_fits_diffusers(preset, workspace, folder, method):
    overrides = [f"adapter.method={method}", 'adapter.targets=["all"]']
    run = family_runs.train(preset, workspace, method, *overrides)
    family_runs.assert_finished(run)
    family_runs.assert_resume_is_exact(run)
    family_runs.assert_diffusers_has_our_weights(run, preset, folder, "transformer", *overrides, layers=28)
