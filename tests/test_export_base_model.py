"""Where weights lie in base models of every layout, and what is no base model."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests import lora_bases, lora_models
from trainer.errors import UserError
from trainer.export.base_model import open_base, read_modules


@pytest.mark.parametrize("kind", ["folder", "single file", "without prefix", "denoiser in diffusers' names"])
@pytest.mark.parametrize("model", lora_models.SIZES)
def test_every_layer_is_found_with_its_weight(tmp_path, model, kind):
    path = lora_bases.folder(tmp_path / "base", model)
    if kind == "denoiser in diffusers' names":
        part = next(iter(lora_models.parts(model)))
        save_file(lora_bases.stored(path / part), tmp_path / "base.safetensors")
        path = tmp_path / "base.safetensors"
    elif kind != "folder":
        prefix = "" if kind == "without prefix" else "model.diffusion_model."
        path = lora_bases.file(tmp_path / "base.safetensors", path, model, prefix)
    base = open_base(path)
    assert base.family == lora_models.SIZES[model]
    found = {module: weight for slot in base.slots for module, weight in read_modules(slot)}
    wanted = {name.removesuffix(".weight"): weight for name, weight in lora_models.weights(model).items()}
    if kind.startswith("denoiser"):
        wanted = {name: weight for name, weight in wanted.items() if not name.startswith("text")}
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name].view(weight.shape), weight), name
    assert {name: shape[:2] for name, shape in base.sizes.items()} == {
        name: tuple(weight.shape[:2]) for name, weight in wanted.items()}


def test_what_is_no_base_is_told(tmp_path):
    base = lora_bases.folder(tmp_path / "sd15", "sd15")
    (tmp_path / "sd3").mkdir()
    (tmp_path / "sd3" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    cases = {base / "unet": "one component of a model",
             tmp_path / "sd3": "is an SD 3 model: give a base model of SD 1.5",
             tmp_path / "x.safetensors": "is no model that is known here", tmp_path / "none": "there is no file"}
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_base(path)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    path = lora_bases.file(tmp_path / "a.safetensors", lora_bases.folder(tmp_path / "f", "klein"), "klein")
    base = open_base(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 4])
    with pytest.raises(UserError, match="is cut short"):
        for slot in base.slots:
            dict(read_modules(slot))
