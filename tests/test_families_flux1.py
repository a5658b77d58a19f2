"""Flux.1: folder, whole file and split files are one model that draws as diffusers' does, and runs end in a LoRA."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from tests import family_runs, models_flux, projects
from trainer import sample
from trainer.errors import UserError
from trainer.families import flux1, transformer

LOADERS = (flux1.load_text_encoder, flux1.load_vae, flux1.load_denoiser)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models_flux.flux1_folder(tmp_path_factory.mktemp("flux1") / "tiny")


@pytest.fixture(scope="module")
def base(folder):
    return flux1.open_base(str(folder))


@pytest.fixture(scope="module")
def loaded(base):
    return [load(base, "cpu", torch.float32) for load in LOADERS]


@pytest.fixture(scope="module")
def preset(folder, tmp_path_factory):
    return family_runs.project(tmp_path_factory.mktemp("project"), "flux1", folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


def open_file(file, folder, **options):
    return flux1.open_base(str(file), tokenizer=str(folder / "tokenizer"), tokenizer_2=str(folder / "tokenizer_2"),
                           **options)


def assert_same(modules, others, cast=torch.float32):
    for module, other in zip(modules, others, strict=True):
        expected, found = module.state_dict(), other.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor.to(cast).float(), found[name].float()) for name, tensor in expected.items())


def given(files):
    return {name: str(file) for name, file in files.items() if name != "transformer"}


def test_an_all_in_one_file_holds_the_same_model_as_its_folder(folder, base, loaded, tmp_path):
    opened = open_file(models_flux.whole_file(tmp_path / "tiny.safetensors", folder), folder)
    assert_same(loaded, [load(opened, "cpu", torch.float32) for load in LOADERS])
    for key, value in opened.parts["transformer"].config.items():
        assert key.startswith("_") or value == list(loaded[2].config[key]) if isinstance(value, list) else True, key
    assert opened.parts["transformer"].config["guidance_embeds"]


@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.bfloat16), ("model.diffusion_model.", torch.float16)])
def test_comfyuis_split_files_make_a_base(folder, loaded, tmp_path, prefix, dtype):
    files = models_flux.split_files(tmp_path, folder, prefix, dtype)
    opened = open_file(files["transformer"], folder, **given(files))
    assert_same(loaded, [load(opened, "cpu", torch.float32) for load in LOADERS], cast=dtype)


@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8_is_read_with_its_scales(folder, loaded, tmp_path, per_row):
    files = models_flux.split_files(tmp_path, folder)
    save_file(models_flux.fp8_scaled(load_file(files["transformer"]), per_row), files["transformer"])
    found = flux1.load_denoiser(open_file(files["transformer"], folder, **given(files)), "cpu", torch.float32)
    for name, tensor in loaded[2].state_dict().items():
        error = (found.state_dict()[name] - tensor).norm() / tensor.norm().clamp(min=1e-9)
        assert error < 0.04, name


def test_missing_parts_are_named(folder, tmp_path):
    files = models_flux.split_files(tmp_path, folder)
    with pytest.raises(UserError, match=r"has no VAE, no text encoder, no second text encoder: give Flux.1's VAE "
                       r"\(such as ae.safetensors\) as model.vae, CLIP-L .* as model.text_encoder, T5-XXL"):
        open_file(files["transformer"], folder)
    with pytest.raises(UserError, match="has no second text encoder: give T5-XXL .* as model.text_encoder_2"):
        open_file(files["transformer"], folder, vae=str(files["vae"]), text_encoder=str(files["text_encoder"]))
    with pytest.raises(UserError, match="T5's tokenizer is missing: give a folder with tokenizer.json"):
        flux1.open_base(str(files["transformer"]), tokenizer=str(folder / "tokenizer"), **given(files))
    with pytest.raises(UserError, match=r"no T5 text encoder: it is a CLIP \(64 wide\). Choose another model.text"):
        open_file(files["transformer"], folder, **given(files) | {"text_encoder_2": str(files["text_encoder"])})


def test_prompts_are_encoded_as_in_diffusers(folder, loaded):
    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    embeds, pooled, _ = pipe.encode_prompt("a red house", None)
    found = flux1.encode_prompts(loaded[0], ["a red house", "x" * 90])
    torch.testing.assert_close(found["prompt_embeds"][:1], embeds)
    torch.testing.assert_close(found["pooled"][:1], pooled)
    assert flux1.prompt_chunks(loaded[0], "x " * 600) > 1


@torch.no_grad()
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_pictures_are_those_of_the_pipeline(tmp_path, guidance):
    source = models_flux.flux1_folder(tmp_path / "tiny", guidance)
    base = flux1.open_base(str(source))
    encoder, vae, denoiser = (load(base, "cpu", torch.float32) for load in LOADERS)
    pipe = FluxPipeline.from_pretrained(source, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = sample.initial_noise([3], flux1.latent_shape(64, 48), "cpu")
    expected = pipe("a red house", height=48, width=64, num_inference_steps=3, guidance_scale=3.5, output_type="np",
                    max_sequence_length=flux1.T5_PLACES[guidance],
                    latents=transformer.pack(noise).flatten(2).mT).images[0]
    latents = sample.draw(flux1, denoiser, flux1.objective(base), seeds=[3], steps=3, guidance=3.5, width=64, height=48,
                          conditioning=flux1.encode_prompts(encoder, ["a red house"]),
                          negative=flux1.encode_prompts(encoder, [""]), device="cpu", dtype=torch.float32)
    picture, = sample.decode(flux1, vae, latents)
    assert np.abs(np.asarray(picture) / 255 - expected).max() < 0.01
    assert bool(base.notes) == (not guidance) and base.variant == ("" if guidance else "schnell")


@pytest.mark.parametrize(("groups", "fuse", "count", "single"), [
    (["attention"], True, 10, ["attn.to_qkv"]), (["feed_forward"], True, 10, ["proj_mlp"]),
    (["single_blocks"], True, 4, ["attn.to_qkv_mlp", "proj_out"]), (["all"], True, 20, ["attn.to_qkv_mlp", "proj_out"]),
    (["attention", "feed_forward"], True, 20, ["attn.to_qkv_mlp", "proj_out"]), (["all"], False, 34, None),
])
def test_adapter_targets_of_a_group(loaded, groups, fuse, count, single):
    targets = flux1.adapter_targets({"transformer": loaded[2]}, groups, fuse)
    names = [target.name for target in targets]
    assert len(set(names)) == len(names) == count
    start = "transformer.single_transformer_blocks.1."
    assert single is None or [name.removeprefix(start) for name in names if name.startswith(start)] == single
    for target in targets:
        assert target.rows == sum(module.out_features for module in target.modules)
        assert len({module.in_features for module in target.modules}) == 1


def test_the_shipped_configs_are_of_the_true_sizes():
    def on_meta(build, name):
        with torch.device("meta"):
            return build(json.loads((flux1._CONFIGS / f"{name}.json").read_text()))

    model = on_meta(FluxTransformer2DModel.from_config, "transformer")
    t5 = on_meta(lambda config: T5EncoderModel(T5Config.from_dict(config)), "text_encoder_2")
    vae = on_meta(AutoencoderKL.from_config, "vae")
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (model, t5, vae)]
    assert counts == [11_901_408_320, 4_762_310_656, 83_819_683]
    assert len(flux1.adapter_targets({"transformer": model}, ["all"])) == 19 * 8 + 38 * 2


@pytest.mark.parametrize("method", family_runs.METHODS)
def test_a_run_trains_resumes_exactly_samples_and_fits_diffusers(preset, workspace, folder, method):
    overrides = [f"adapter.method={method}", 'adapter.targets=["all"]']
    run = family_runs.train(preset, workspace, method, *overrides)
    family_runs.assert_finished(run)
    family_runs.assert_resume_is_exact(run)
    if method == "stella":
        start = projects.session(preset, workspace, *family_runs.SMALL, *overrides,
                                 f"adapter.start_from={run.result.as_posix()}", name="continued").adapter
        trained = projects.session(preset, workspace, *family_runs.SMALL, *overrides, name=run.name).adapter
        for target in start.layout.targets:
            torch.testing.assert_close(start.delta(target.name), trained.delta(target.name, "ema"), atol=1e-5,
                                       rtol=1e-3)
    family_runs.assert_diffusers_has_our_weights(run, preset, folder, "transformer", *overrides, layers=34)
