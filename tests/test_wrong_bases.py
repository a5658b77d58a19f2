"""The table of wrong bases and parts of bases, for every family: each is told by name, with the setting to change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models, models_flux, models_sdxl
from tests.test_wrong_inputs import assert_plain
from trainer import families
from trainer import run as runs
from trainer.errors import UserError
from trainer.families import parts
from trainer.families.recognise import FAMILIES, KINDS
from trainer.families.tensors import Part


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A diffusers folder of each family."""
    place = tmp_path_factory.mktemp("bases")
    return {"sd15": models.sd15_folder(place / "sd15"), "sdxl": models_sdxl.folder(place / "sdxl"),
            "flux1": models_flux.flux1_folder(place / "flux1"), "flux2": models_flux.klein_folder(place / "flux2")}


@pytest.fixture(scope="module")
def files(bases, tmp_path_factory) -> dict[str, Path]:
    """The same as single files."""
    place = tmp_path_factory.mktemp("files")
    makers = {"sd15": models.sd15_file, "sdxl": models_sdxl.single_file, "flux1": models_flux.whole_file,
              "flux2": models_flux.whole_file}
    return {family: make(place / f"{family}.safetensors", bases[family]) for family, make in makers.items()}


@pytest.fixture(scope="module")
def split(bases, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """ComfyUI's split files of the Flux models."""
    place = tmp_path_factory.mktemp("split")
    return {family: models_flux.split_files(place / family, bases[family]) for family in ("flux1", "flux2")}


def refusal(family: str, base: Path, **options: object) -> str:
    with pytest.raises(UserError) as error:
        families.get(family).open_base(str(base), **{name: str(value) for name, value in options.items()})
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", FAMILIES)
def test_a_base_of_another_family_names_both_and_the_setting(bases, files, family, other):
    for base in (bases[other], files[other]):
        if other == family:
            assert families.get(family).open_base(str(bases[family])).parts
        else:
            assert refusal(family, base) == (
                f"{base} is {KINDS[other]}, and model.family = '{family}' needs {KINDS[family]}: "
                f"set model.family = '{other}', or choose another model.base")


def test_wrong_text_encoders_are_told_by_what_they_are(bases, split, tmp_path):
    clip, t5, qwen = bases["flux1"] / "text_encoder", bases["flux1"] / "text_encoder_2", bases["flux2"] / "text_encoder"
    table = [
        ("flux1", {"text_encoder": t5}, "no CLIP text encoder: it is a T5 (32 wide). Choose another model.text"),
        ("flux1", {"text_encoder": split["flux1"]["text_encoder_2"]}, "no CLIP text encoder: it is a T5 (32 wide)."),
        ("flux1", {"text_encoder_2": clip}, "no T5 text encoder: it is a CLIP (64 wide). Choose another model.text"),
        ("flux1", {"text_encoder_2": qwen}, "no T5 text encoder: it is a Qwen3 (16 wide). Choose another"),
        ("flux1", {"text_encoder_2": bases["sd15"] / "vae"}, "no T5 text encoder: it is a VAE alone"),
        ("flux2", {"text_encoder": t5}, "no Qwen3 or Mistral text encoder: it is a T5 (32 wide). Choose another"),
        ("sd15", {"text_encoder": t5}, "no CLIP text encoder: it is a T5 (32 wide)"),
        ("sd15", {"text_encoder": bases["sdxl"] / "text_encoder_2"}, "is a CLIP (128 wide), and the UNet of"),
        ("sdxl", {"text_encoder": bases["sdxl"] / "text_encoder_2", "text_encoder_2": bases["sdxl"] / "text_encoder"},
         "is a CLIP (64 wide), and the UNet of"),
    ]  # fmt: skip
    for family, given, message in table:
        assert message in refusal(family, bases[family], **given), (family, given)
    narrow = shutil.copytree(qwen, tmp_path / "narrow")
    tensors = {name: tensor[..., :8].contiguous() for name, tensor in load_file(qwen / "model.safetensors").items()}
    save_file(tensors, narrow / "model.safetensors")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"hidden_size": 8}))
    told = refusal("flux2", bases["flux2"], text_encoder=narrow)
    assert "is a Qwen3 (8 wide), and the transformer of" in told
    assert "needs a Qwen3 (16 wide): choose another model.text_encoder" in told


def test_the_encoders_of_kleins_two_sizes_are_told_by_name():
    part = Part(Path("/models/qwen_3_4b.safetensors"), {}, {}, "hf")
    with pytest.raises(UserError) as error:
        parts.check_text(part, "text_encoder", ("qwen3", 2560), ("qwen3", 4096), "the transformer of klein-9b")
    assert str(error.value) == ("the text encoder of /models/qwen_3_4b.safetensors is Qwen3-4B (2560 wide), and the "
                                "transformer of klein-9b needs Qwen3-8B (4096 wide): choose another model.text_encoder")


def test_wrong_vaes_are_told_by_whose_they_are(bases, split):
    table = [
        ("flux2", bases["flux1"] / "vae", "16 latent channels, as Flux.1 has, instead of 32"),
        ("flux2", split["flux1"]["vae"], "16 latent channels, as Flux.1 has, instead of 32"),
        ("flux1", bases["flux2"] / "vae", "32 latent channels, as Flux.2 has, instead of 16"),
        ("flux1", bases["sdxl"] / "vae", "scales its latents by 0.13025, and this family's by 0.3611"),
        ("sd15", bases["sdxl"] / "vae", "scales its latents by 0.13025, and this family's by 0.18215"),
        ("sdxl", split["flux1"]["vae"], "16 latent channels, as Flux.1 has, instead of 4"),
        ("sd15", bases["flux1"] / "text_encoder_2", "has no VAE: it is a T5 (32 wide)"),
        ("flux1", split["flux1"]["text_encoder"], "has no VAE: it is a CLIP (64 wide)"),
    ]
    for family, vae, message in table:
        told = refusal(family, bases[family], vae=vae)
        assert message in told and "hoose another model.vae" in told and str(vae) in told, told


def test_weights_that_were_already_quantised_are_refused(bases, split, tmp_path):
    copy = shutil.copytree(bases["flux1"], tmp_path / "copy")
    config = json.loads((copy / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (copy / "transformer" / "config.json").write_text(json.dumps(config))
    assert "transformer holds weights that were already quantised (bitsandbytes): use the" in refusal("flux1", copy)
    tensors = load_file(split["flux1"]["transformer"])
    state = {"double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}
    save_file(tensors | state, tmp_path / "nf4.safetensors")
    told = refusal("flux1", tmp_path / "nf4.safetensors")
    assert "nf4.safetensors is a model that was already quantised" in told
    assert "use its bf16, fp16 or fp8 file" in told


def gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    return folder / "model.gguf"


def renamed_pickle(folder: Path) -> Path:
    torch.save({"state_dict": {}}, folder / "model.safetensors")
    return folder / "model.safetensors"


def web_page(folder: Path) -> Path:
    (folder / "model.safetensors").write_text("<html><title>Log in</title></html>")
    return folder / "model.safetensors"


def truncated(folder: Path) -> Path:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(96, 32)}, folder / "cut.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-1])
    return folder / "cut.safetensors"


def lora(folder: Path) -> Path:
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 4), "transformer.x.lora_B.weight": torch.zeros(4, 2)},
              folder / "style.safetensors")
    return folder / "style.safetensors"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


WRONG = {
    "a GGUF": (gguf, r"model\.gguf is not a safetensors file but a GGUF, quantised for drawing: use the \.safetensors"),
    "a pickle by another name": (renamed_pickle, r"model\.safetensors is not .* but a pickle under another name"),
    "a web page": (web_page, r"model\.safetensors is not a safetensors file but a web page: download the file itself"),
    "a file cut short": (truncated, r"cut\.safetensors is cut short: it has [\d,]+ of [\d,]+ bytes\. Download it"),
    "a LoRA": (lora, r"style\.safetensors is a LoRA, .*: choose another .*; to go on training it, give it as adapter"),
    "an empty folder": (empty, r"empty is not a model: it has no model_index\.json and no \.safetensors file"),
}


@pytest.mark.parametrize("make, message", WRONG.values(), ids=WRONG)
def test_what_is_no_model_is_told_and_leaves_no_run(tiny_project, tmp_path, trainer, make, message):
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, "--set=model.family=flux2",
                      f"--set=model.base={make(tmp_path)}")
    assert_plain(outcome, message)
    assert not runs.is_taken(tmp_path, "tiny")


def test_a_transformer_alone_names_all_that_is_missing_and_what_to_give(tiny_project, split, tmp_path, trainer):
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, "--set=model.family=flux1",
                      f"--set=model.base={split['flux1']['transformer']}")
    assert_plain(outcome, r"transformer\.safetensors has no VAE, no text encoder, no second text encoder: give "
                          r"Flux\.1's VAE \(such as ae\.safetensors\) as model\.vae, CLIP-L .* as model\.text_enc")
    assert not runs.is_taken(tmp_path, "tiny")


def test_a_distilled_klein_is_told_before_anything_is_loaded(tiny_project, tmp_path, trainer):
    base = models_flux.klein_folder(tmp_path / "klein", distilled=True)
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, "--set=model.family=flux2", "--check",
                      f"--set=model.base={base}")
    assert "warning: this klein model is distilled to draw in four steps without guidance" in outcome.out
    assert "Train on the base (FLUX.2-klein-base-4B or -9B)" in outcome.out
