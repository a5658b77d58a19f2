"""Every family loads quantised from every layout, to the same bits, and ComfyUI's fp8 files as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import models, models_flux, models_sdxl
from tests.family_runs import MAKERS
from trainer import families
from trainer.quantize.linear import QuantizedLinear
from trainer.quantize.model import MODES, linears_in_blocks, quantised_linear

LAYERS = {"sd15": (160, 18), "sdxl": (170, 36), "flux1": (40, 14), "flux2": (28, 189)}  # of denoiser, text encoder
ERROR = {"int8": 0.03, "fp8": 0.1, "nf4": 0.3}  # of what the tiny models make of it


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: make(root / family) for family, make in MAKERS.items()}


def denoiser(family: str, base: object, mode: str) -> nn.Module:
    return families.get(family).load_denoiser(base, "cpu", torch.float32, mode)


def quantised(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    first, second = everything(model), everything(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@torch.no_grad()
@pytest.mark.parametrize("family", MAKERS)
def test_blocks_are_quantised_and_the_model_does_nearly_the_same(folders, family):
    code, base = families.get(family), families.get(family).open_base(str(folders[family]))
    noise = torch.randn(1, *code.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    whole = denoiser(family, base, "none")
    text = code.encode_prompts(code.load_text_encoder(base, "cpu", torch.float32), ["a red house"])
    exact = code.predict(whole, noise, torch.tensor([500.0]), text)
    weights = whole.state_dict()
    for mode in MODES:
        encoder, model = code.load_text_encoder(base, "cpu", torch.float32, mode), denoiser(family, base, mode)
        assert quantised(model).keys() == linears_in_blocks(whole).keys()
        assert (len(quantised(model)), len(quantised(encoder))) == LAYERS[family]
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        for ours, theirs in ((code.predict(model, noise, torch.tensor([500.0]), text), exact),
                             (code.encode_prompts(encoder, ["a red house"])["prompt_embeds"], text["prompt_embeds"])):
            assert 0 < (ours - theirs).norm() <= ERROR[mode] * theirs.norm()


def sharded(folder: Path, source: Path) -> str:
    """The folder's denoiser cut in shards, in a folder of its own with links to the rest."""
    folder.mkdir()
    for item in source.iterdir():
        if item.name != "unet":
            (folder / item.name).symlink_to(item)
    base = families.get("sd15").open_base(str(source))
    denoiser("sd15", base, "none").save_pretrained(folder / "unet", max_shard_size="2MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    return str(folder)


@pytest.mark.parametrize("mode", MODES)
def test_shards_and_single_files_of_unets_come_out_as_their_folder(folders, tmp_path, mode):
    for family, file in (("sd15", models.sd15_file), ("sdxl", models_sdxl.single_file)):
        code, source = families.get(family), folders[family]
        expected = denoiser(family, code.open_base(str(source)), mode)
        tokenizers = {name: str(source / name) for name in ("tokenizer", "tokenizer_2") if (source / name).is_dir()}
        whole = code.open_base(str(file(tmp_path / f"{family}.safetensors", source)), **tokenizers)
        assert_same(denoiser(family, whole, mode), expected)
        if family == "sd15":
            assert_same(denoiser(family, code.open_base(sharded(tmp_path / "sharded", source)), mode), expected)


def open_split(family: str, files: dict[str, Path], source: Path) -> object:
    parts = {name: str(file) for name, file in files.items() if name != "transformer"}
    tokenizers = {name: str(source / name) for name in ("tokenizer", "tokenizer_2") if (source / name).is_dir()}
    return families.get(family).open_base(str(files["transformer"]), **parts, **tokenizers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_split_files_of_flux_come_out_as_their_folder(folders, tmp_path, family, mode):
    code, source = families.get(family), folders[family]
    expected = code.open_base(str(source))
    found = open_split(family, models_flux.split_files(tmp_path, source, "model.diffusion_model."), source)
    assert_same(denoiser(family, found, mode), denoiser(family, expected, mode))
    encoders = [code.load_text_encoder(base, "cpu", torch.float32, mode) for base in (found, expected)]
    assert_same(*encoders)


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linears of blocks as ComfyUI's fp8-scaled files have them, in any naming."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "relative" not in name and re.search(r"transformer_blocks\.|layers\.|\.block\.", name):
            scale = tensor.abs().amax() / 448
            found[name] = (tensor / scale).to(torch.float8_e4m3fn)
            found[f"{name.removesuffix('weight')}scale_weight"] = scale
    return found


def assert_codes_of(model: nn.Module, other: nn.Module) -> None:
    """`model` holds fp8 codes that make exactly the weights that `other` was given in full."""
    layers = quantised(model)
    assert layers
    for path, layer in layers.items():
        assert layer.codes.dtype == torch.float8_e4m3fn
        assert torch.equal(layer.weight, other.get_submodule(path).weight), path


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_scaled_fp8_files_of_flux_are_held_exactly(folders, tmp_path, family, per_row):
    source = folders[family]
    files = models_flux.split_files(tmp_path, source)
    tensors = models_flux.fp8_scaled(load_file(files["transformer"]), per_row)
    save_file(tensors, files["transformer"])
    base = open_split(family, files, source)
    model = denoiser(family, base, "fp8")
    assert_codes_of(model, denoiser(family, base, "none"))
    stored = torch.cat([tensor.float().flatten() for tensor in tensors.values() if tensor.dtype == torch.float8_e4m3fn])
    held = torch.cat([layer.codes.float().flatten() for layer in quantised(model).values()])
    assert torch.equal(stored.sort().values, held.sort().values)  # not one was quantised again


def test_scaled_fp8_files_of_a_unet_and_of_text_encoders_are_held_exactly(folders, tmp_path):
    single = models_sdxl.single_file(tmp_path / "sdxl.safetensors", folders["sdxl"])
    save_file(in_fp8(load_file(single)), single)
    tokenizers = {name: str(folders["sdxl"] / name) for name in ("tokenizer", "tokenizer_2")}
    base = families.get("sdxl").open_base(str(single), **tokenizers)
    assert_codes_of(denoiser("sdxl", base, "fp8"), denoiser("sdxl", base, "none"))
    for family in ("flux1", "flux2"):
        files = models_flux.split_files(tmp_path / family, folders[family])
        for name in ("text_encoder", "text_encoder_2"):
            if name in files:
                save_file(in_fp8(load_file(files[name])), files[name])
        base, code = open_split(family, files, folders[family]), families.get(family)
        exact = code.load_text_encoder(code.open_base(str(folders[family])), "cpu", torch.float32)
        whole, held = (code.load_text_encoder(base, "cpu", torch.float32, mode) for mode in ("none", "fp8"))
        assert_codes_of(held, whole)
        for (name, tensor), expected in zip(whole.state_dict().items(), exact.state_dict().values(), strict=True):
            assert (tensor - expected).norm() <= 0.06 * tensor.norm(), name


def test_plain_fp8_files_have_no_scale(folders, tmp_path):
    files = models_flux.split_files(tmp_path, folders["flux1"])
    tensors = load_file(files["transformer"])
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, files["transformer"])
    base = open_split("flux1", files, folders["flux1"])
    assert_codes_of(denoiser("flux1", base, "fp8"), denoiser("flux1", base, "none"))


def test_the_model_is_deterministic(folders):
    """What an exact resume rests on."""
    base = families.get("flux2").open_base(str(folders["flux2"]))
    assert_same(denoiser("flux2", base, "nf4"), denoiser("flux2", base, "nf4"))
    assert quantised_linear(torch.ones(2, 3), None, None, "nf4", torch.float32).weight.unique().tolist() == [1.0]
