"""What `python -m trainer.export verify` and `convert` say, and when they fail."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.exporting import shortened
from tests import lora_models
from tests.models import sd15_file, sd15_folder
from trainer.errors import UserError
from trainer.export.__main__ import main
from trainer.export.report import as_json, as_text, examine
from trainer.export.sizes import base_sizes, true_sizes
from trainer.export.writer import write

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV, OTHER = "unet.up_blocks.1.resnets.0.conv1", "unet.conv_in"


def pairs(sizes, *modules, rank=4):
    generator, found = torch.Generator().manual_seed(0), []
    for module in modules:
        m, n, *kernel = sizes[module]
        found.append((module, torch.randn(m, rank, *[1] * len(kernel), generator=generator),
                      torch.randn(rank, n, *kernel, generator=generator), None))
    return found


@pytest.fixture
def path(tmp_path):
    """A right file for the true SD 1.5."""
    sizes = true_sizes("sd15")["SD 1.5"]
    write(tmp_path / "good.safetensors", pairs(sizes, Q, CONV, OTHER), family="sd15", dtype="fp16",
          metadata={})
    return tmp_path / "good.safetensors"


def change(path, **changes):
    """Rewrite tensors of a file, by the ending of their names; None takes one out."""
    tensors = load_file(path)
    for ending, value in changes.items():
        for name in [name for name in tensors if name.startswith(KEY) and name.endswith(ending)]:
            tensors.pop(name) if value is None else tensors.update({name: value})
    save_file(tensors, path)


def test_a_good_file_is_good_for_every_program(path):
    report = examine(path)
    assert report.good and (report.family, report.format, report.dtype, report.ranks) == ("sd15", "U1", "fp16", [4])
    assert report.model == "SD 1.5" and [reading.consumer for reading in report.asked] == [
        "comfyui", "a1111", "forge", "diffusers"]
    text = as_text(report)
    assert "good.safetensors: SD 1.5, format U1 (kohya's, with diffusers' block names)" in text
    assert "3 layers, rank 4, alpha 4, fp16" in text and "ComfyUI reads all 3 layers at full strength" in text
    assert "FAULT" not in text and KEY in text


def test_norms_and_ranks_are_those_of_the_whole_change(path):
    layers = {layer.key: layer for layer in examine(path).layers}
    tensors = load_file(path)
    for key, layer in layers.items():
        up, down = (tensors[f"{key}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
        if "resnets" in key:  # the whole product is as large as the layer: the same numbers from its core
            up, down = torch.linalg.qr(up).R, torch.linalg.qr(down.T).R.T
        sigma = torch.linalg.svdvals(up @ down)[:4]
        p = sigma / sigma.sum()
        assert layer.norm == pytest.approx(sigma.norm().item(), rel=1e-6)
        assert layer.erank == pytest.approx(torch.special.entr(p).sum().exp().item(), rel=1e-6)
        assert layer.stable == pytest.approx(((sigma**2).sum() / sigma[0] ** 2).item(), rel=1e-6)
    assert layers["lora_unet_up_blocks_1_resnets_0_conv1"].weight == (1280, 2560, 3, 3)


def test_tiny_and_vast_numbers_have_their_norms(path):
    change(path, **{".lora_up.weight": torch.full((1280, 4), 1e-30), ".lora_down.weight": torch.full((4, 1280), 1e20)})
    layer = next(layer for layer in examine(path).layers if layer.key == KEY)
    assert layer.norm == pytest.approx(4e-10 * 1280, rel=1e-6) and layer.erank == pytest.approx(1.0)


@pytest.mark.parametrize(("tensor", "words"), [
    (torch.full((1280, 4), math.nan), "numbers that are not finite in 1 layers, such as lora_unet_mid"),
    (torch.full((1280, 4), math.inf), "every program draws black")])
def test_numbers_that_are_not_finite_are_a_fault(path, tensor, words):
    change(path, **{".lora_up.weight": tensor})
    report = examine(path)
    assert not report.good and words in report.faults[0]
    assert "reads all" not in as_text(report)
    layers = json.loads(json.dumps(as_json(report), allow_nan=False))["layers"]
    assert [layer["key"] for layer in layers if layer["norm"] is None] == [KEY]


def test_idle_layers_are_a_note_and_an_idle_file_a_fault(path):
    change(path, **{".lora_up.weight": torch.zeros(1280, 4)})
    report = examine(path)
    assert report.good and "1 layers change nothing" in as_text(report)
    save_file({name: torch.zeros_like(tensor) if "up" in name else tensor for name, tensor in load_file(path).items()},
              path)
    report = examine(path)
    assert "the file changes nothing" in report.faults[0] and "reads all" not in as_text(report)
    assert all("without any effect" in reading.faults[0].text for reading in report.asked)


def with_magnitude(path, magnitude, up):
    """The file with a DoRA magnitude along the input axis, as kohya's programs read it."""
    change(path, **{".lora_up.weight": up})
    save_file({**load_file(path), f"{KEY}.dora_scale": magnitude}, path)


def test_a_magnitude_that_is_not_finite_is_a_fault(path, capsys):
    with_magnitude(path, torch.full((1, 1280), math.nan), torch.ones(1280, 4))
    assert main(["verify", str(path), "--for", "comfyui"]) == 1
    assert "numbers that are not finite in 1 layers, such as " + KEY in capsys.readouterr().out


def test_a_layer_that_changes_magnitudes_alone_is_not_idle(path):
    with_magnitude(path, torch.full((1, 1280), 2.0), torch.zeros(1280, 4))
    report = examine(path, consumers=["comfyui"])
    assert report.good and not any("change nothing" in note for note in report.notes)
    save_file({name: torch.zeros_like(tensor) if "up" in name else tensor for name, tensor in load_file(path).items()},
              path)
    assert examine(path, consumers=["comfyui"]).good


def test_shapes_of_another_model_are_told(tmp_path):
    sizes = {Q: (640, 640), CONV: (1280, 2560, 3, 3)}
    write(tmp_path / "a.safetensors", pairs(sizes, Q, CONV), family="sd15", dtype="fp16",
          metadata={"ss_base_model_version": "sd_v1"})
    report = examine(tmp_path / "a.safetensors")
    assert not report.good and report.misfits[0].expected == (1280, 1280)
    assert "1 of 2 layers do not fit SD 1.5: lora_unet_mid" in as_text(report)
    assert "is 640 x 640 instead of 1280 x 1280; no program can apply these" in as_text(report)


@pytest.mark.parametrize("wrong", ["shape", "numbers", "zero"])
def test_text_json_tick_and_exit_code_agree(tmp_path, path, wrong, capsys):
    change(path, **{"shape": {".lora_up.weight": torch.ones(640, 4)},
                    "numbers": {".lora_down.weight": torch.full((4, 1280), math.nan)}, "zero": {}}[wrong])
    if wrong == "zero":
        save_file({name: tensor * 0 if "up" in name else tensor for name, tensor in load_file(path).items()}, path)
    assert main(["verify", str(path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["good"] and not any(reading["whole"] for reading in said["asked"].values())
    page = shortened(said)
    assert page["faults"] and not any(tick["good"] for tick in page["ticks"])
    assert main(["verify", str(path)]) == 1
    assert "reads all" not in capsys.readouterr().out


def test_a_layer_that_the_model_has_not_is_told(tmp_path):
    sizes = true_sizes("sd15")["SD 1.5"]
    strange = Q.replace("mid_block.attentions.0", "up_blocks.3.attentions.7")
    write(tmp_path / "a.safetensors", [*pairs(sizes, Q), (strange, *pairs(sizes, Q)[0][1:])], family="sd15",
          dtype="fp16", metadata={})
    assert "is for a layer that it has not" in as_text(examine(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(("model", "name"), [("dev", "Flux.2 dev"), ("klein", "Flux.2 klein 4B"),
                                             ("klein9b", "Flux.2 klein 9B")])
def test_the_model_is_told_by_its_sizes(tmp_path, model, name):
    layers = ("transformer.single_transformer_blocks.3.attn.to_out", "transformer.transformer_blocks.0.attn.to_q")
    write(tmp_path / "a.safetensors", pairs(true_sizes("flux2")[name], *layers, rank=1), family="flux2", dtype="bf16",
          metadata={})
    assert (examine(tmp_path / "a.safetensors").model, examine(tmp_path / "a.safetensors").misfits) == (name, [])


# A base of one's own


@pytest.mark.parametrize("model", ["sd15", "sdxl", "flux1", "klein", "dev"])
def test_a_file_is_compared_with_the_base_at_hand(tmp_path, model):
    family, sizes = lora_models.SIZES[model], {}
    for name, part in lora_models.parts(model).items():
        part.save_pretrained(tmp_path / "base" / name)
    sizes = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in lora_models.weights(model).items()}
    write(tmp_path / "a.safetensors", pairs(sizes, *sizes, rank=2), family=family, dtype="fp32", metadata={})
    assert base_sizes(tmp_path / "base", family).items() >= sizes.items()
    report = examine(tmp_path / "a.safetensors", base=tmp_path / "base")
    assert report.misfits == [] and report.model == "base"
    misfits = examine(tmp_path / "a.safetensors").misfits
    assert len(misfits) == len(report.layers) and "--base" in as_text(examine(tmp_path / "a.safetensors"))


def test_a_single_file_has_the_sizes_of_its_folder(tmp_path):
    folder = sd15_folder(tmp_path / "folder")
    file = sd15_file(tmp_path / "model.safetensors", folder)
    of_folder, of_file = base_sizes(folder, "sd15"), base_sizes(file, "sd15")
    layers = [name for name in of_folder if "attn" in name or "conv" in name or "mlp" in name]
    assert len(layers) > 150 and all(of_file[name] == of_folder[name] for name in layers)


@pytest.mark.parametrize(("base", "words"), [
    ("folder", "has no unet, and the LoRA is for SD 1.5"), ("nothing.safetensors", "there is no file"),
    ("lora.safetensors", "is a LoRA, not a base model, and the LoRA is for SD 1.5"),
    ("empty", "is no diffusers folder")])
def test_a_wrong_base_is_told(tmp_path, path, base, words):
    lora_models.parts("klein")["transformer"].save_pretrained(tmp_path / "folder" / "transformer")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=words):
        examine(path, base=tmp_path / base)


# The command line


def test_verify_succeeds_and_fails_by_exit_code(tmp_path, path, capsys):
    assert main(["verify", str(path)]) == 0
    assert "Forge reads all 3 layers" in capsys.readouterr().out
    change(path, **{".alpha": torch.tensor(2.0)})
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "FAULT  diffusers applies attention layers at 2 times" in out
    assert main(["verify", str(path), "--for", "comfyui,a1111"]) == 0  # the others are notes
    assert "note   diffusers applies attention layers at 2 times" in capsys.readouterr().out


def test_verify_gives_json(path, capsys):
    assert main(["verify", str(path), "--json", "--for", "comfyui"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["good"] and report["asked"]["comfyui"] == {
        "whole": True, "faults": [], "strengths": {"1": 3},
        "keys": {layer["key"]: {"matched": True, "strength": 1.0} for layer in report["layers"]}}
    assert set(report["others"]) == {"a1111", "forge", "diffusers"} and len(report["layers"]) == 3


def test_json_says_of_each_key_what_a_program_does(path, capsys):
    change(path, **{".alpha": torch.tensor(2.0)})
    save_file({**load_file(path), "alien.weight": torch.ones(1)}, path)
    assert main(["verify", str(path), "--json"]) == 1
    asked = json.loads(capsys.readouterr().out)["asked"]
    assert asked["comfyui"]["keys"][KEY] == {"matched": True, "strength": 1.0}
    assert asked["comfyui"]["keys"]["alien.weight"] == {"matched": False, "strength": 0.0}
    assert len(asked["comfyui"]["keys"]) == 4 and not asked["diffusers"]["keys"][KEY]["matched"]  # it raises an error
    change(path, **{".lora_up.weight": torch.full((1280, 4), math.nan)})
    assert main(["verify", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["asked"]["comfyui"]["keys"][KEY]["strength"] is None


@pytest.mark.parametrize(("arguments", "words"), [
    (["verify", "nothing.safetensors"], "there is no file nothing.safetensors"),
    (["verify", "FILE", "--for", "comfy"], "--for comfy: choose of comfyui, a1111, forge, diffusers"),
    (["verify", "FILE", "--base", "nowhere"], "there is no file nowhere"), (["verify"], "FILE"), ([], "COMMAND"),
    (["convert", "FILE", "--to", "F5", "--out", "b.safetensors"], "F5 is no format for SD 1.5 files"),
    (["convert", "FILE", "--out", "b.safetensors"], "--to")])
def test_mistakes_are_told_in_a_sentence(path, arguments, words, capsys):
    assert main([str(path) if item == "FILE" else item for item in arguments]) == 1
    text = capsys.readouterr().err
    assert words in text and "Traceback" not in text


def test_convert_writes_and_says_what(tmp_path, path, capsys):
    out = tmp_path / "other.safetensors"
    assert main(["convert", str(path), "--to", "U2", "--out", str(out), "--dtype", "fp32"]) == 0
    assert "other.safetensors: format U2, rank 4, 9 tensors" in capsys.readouterr().out
    assert examine(out).format == "U2" and examine(out).dtype == "fp32"
