"""What a file says of itself, for people and for programs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import lora_bases
from trainer.export.__main__ import main
from trainer.export.convert import convert
from trainer.export.describe import as_text, describe
from trainer.export.merge import merge
from trainer.export.texts import Labels


@pytest.mark.parametrize(("model", "form", "layers"), [
    ("sd15", "U1", {"unet": 128, "text_encoder": 8}), ("klein", "F6", {"transformer": 20})])
def test_kind_layers_and_history(tmp_path, model, form, layers):
    groups = ("attention", *(["text_encoder"] if model == "sd15" else []))
    source = lora_bases.lora(tmp_path / "a.safetensors", model, groups, form)
    convert(source, form, tmp_path / "b.safetensors", labels=Labels("Night", "Ada", ("ohwx",)))
    merge([tmp_path / "b.safetensors"] * 2, [1.0, 0.5], tmp_path / "c.safetensors")
    about = describe(tmp_path / "c.safetensors")
    assert about["format"] == form and about["author"] == "Ada" and about["triggers"] == ["ohwx"]
    assert about["layers"].keys() == layers.keys() and about["unknown"] == [] and not about["dora"]
    assert about["bytes"] == (tmp_path / "c.safetensors").stat().st_size
    said = as_text(about)
    for part in (f"format {form}", "author: Ada", "trigger words: ohwx", "merge of b.safetensors, b.safetensors x 0.5",
                 "modelspec.title = Night"):
        assert part in said.replace(" x 1,", ","), part


def test_the_command_line_inspects(tmp_path, capsys):
    source = lora_bases.lora(tmp_path / "a.safetensors", "sdxl", ("attention",), dora=True)
    assert main(["inspect", str(source)]) == 0
    assert "with DoRA magnitudes" in capsys.readouterr().out
    assert main(["inspect", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dora"] is True
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert main(["inspect", str(tmp_path / "b.safetensors")]) == 1
    assert "it is empty" in capsys.readouterr().err


def test_every_command_explains_itself(capsys):
    for command in ("inspect", "verify", "convert", "resize", "merge", "bake", "extract", "compare"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and f"trainer.export {command}" in capsys.readouterr().out
        assert main([command]) == 1
        assert "are required" in capsys.readouterr().err


@pytest.mark.parametrize("step", ['{"what":"a","from":5}', '{"what":"a","from":[{"name":"b","weight":"abc"},7]}',
                                  '{"what":5,"from":[{"weight":[1]}]}', '{"from":null}', '5'])
def test_a_strange_history_and_alpha_are_described(tmp_path, step, capsys):
    source = lora_bases.lora(tmp_path / "a.safetensors", "sd15", ("attention",))
    alpha = {key: torch.tensor(math.nan) for key in load_file(source) if key.endswith(".alpha")}
    save_file(load_file(source) | alpha, source, {"stiefel_studio_history": f"[{step}]"})
    assert main(["inspect", str(source)]) == 0 and main(["inspect", str(source), "--json"]) == 0
    assert "NaN" not in capsys.readouterr().out.splitlines()[-1]
