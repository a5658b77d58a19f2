"""Merged LoRAs: the exact sum side by side, the nearest one at a rank, what is written of them, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import lora_bases, lora_models
from tests.test_export_resize import changes
from trainer.errors import UserError
from trainer.export import texts
from trainer.export.__main__ import main
from trainer.export.convert import convert
from trainer.export.lora_file import open_lora
from trainer.export.merge import merge
from trainer.export.texts import Labels

GROUPS = {"sd15": ("all", "text_encoder"), "sdxl": ("all", "text_encoder"), "flux1": ("all",), "klein": ("all",)}
OTHER = {"sd15": "U2", "sdxl": "U1", "flux1": "F6", "klein": "F5"}


def two(path, model):
    """Two LoRAs of different formats, and layers that only one of them has."""
    return [lora_bases.lora(path / "a.safetensors", model, GROUPS[model]),
            lora_bases.lora(path / "b.safetensors", model, ("attention",), OTHER[model], seed=7)]


def sums(files, weights):
    """Module → weighted sum of ΔW."""
    total = {}
    for file, weight in zip(files, weights):
        for name, matrix in changes(file).items():
            total[name] = total.get(name, 0) + weight * matrix
    return total


@pytest.mark.parametrize("model", GROUPS)
def test_side_by_side_is_the_exact_sum(tmp_path, model):
    files = two(tmp_path, model)
    done = merge(files, [0.5, -2.0], tmp_path / "c.safetensors")
    wanted, found = sums(files, [0.5, -2.0]), changes(tmp_path / "c.safetensors")
    assert found.keys() == wanted.keys()
    for name, matrix in wanted.items():  # the weights are powers of two: nothing is rounded
        assert torch.dist(found[name], matrix) <= 1e-12 * matrix.norm(), name
    assert done.written.rank == 6 and done.written.format == {"sd15": "U1", "sdxl": "U2"}.get(model, "F1")


@pytest.mark.parametrize("model", ["sdxl", "klein"])
def test_a_rank_gives_the_nearest_of_the_sum(tmp_path, model):
    files = two(tmp_path, model)
    done = merge(files, [1.0, 0.5], tmp_path / "c.safetensors", rank=2)
    lost = energy = 0.0
    found = changes(tmp_path / "c.safetensors")
    for name, matrix in sums(files, [1.0, 0.5]).items():
        energy, lost = energy + float(matrix.square().sum()), lost + float((found[name] - matrix).square().sum())
        if "qkv" not in name and not any(part in name for part in (".to_q", ".to_k", ".to_v", ".add_")):
            assert torch.dist(found[name], matrix) <= torch.linalg.svdvals(matrix)[2:].norm() * (1 + 1e-4) + 1e-5
    assert done.kept == pytest.approx(1 - lost / energy, abs=1e-5) and done.written.rank == 2
    merge(files, [1.0, 0.5], tmp_path / "d.safetensors", rank=6)
    full = changes(tmp_path / "d.safetensors")
    for name, matrix in sums(files, [1.0, 0.5]).items():
        assert torch.dist(full[name], matrix) <= 1e-6 * matrix.norm(), name


def test_metadata_tell_what_was_merged(tmp_path):
    files = two(tmp_path, "sd15")
    for number, (file, trigger) in enumerate(zip(list(files), ("cat", "dog"))):
        files[number] = tmp_path / f"{trigger}.safetensors"
        convert(file, "auto", files[number], labels=Labels(title=trigger.title(), author="Ada", triggers=(trigger,)))
    merge(files, [0.8, 1.2], tmp_path / "c.safetensors")
    said = open_lora(tmp_path / "c.safetensors").metadata
    assert said["modelspec.author"] == "Ada" and "modelspec.title" not in said
    assert said["modelspec.merged_from"] == "Cat, Dog" and texts.triggers(said) == ["cat", "dog"]
    assert said["ss_base_model_version"] == "sd_v1" and said["ss_network_dim"] == "6"
    [step] = texts.history(said)
    assert [one["name"] for one in step["from"]] == ["cat.safetensors", "dog.safetensors"]
    assert [one["weight"] for one in step["from"]] == [0.8, 1.2]
    assert [one["hash"] for one in step["from"]] == [open_lora(file).metadata["sshs_model_hash"] for file in files]


@pytest.mark.parametrize(("first", "second", "result"), [
    ("fp16", "fp16", "fp16"), ("bf16", "fp32", "fp32"), ("fp16", "bf16", "fp32")])
def test_precision_is_that_which_holds_both(tmp_path, first, second, result):
    a = lora_bases.lora(tmp_path / "a.safetensors", "sd15", ("attention",))
    for name, dtype in (("b", first), ("c", second)):
        convert(a, "U1", tmp_path / f"{name}.safetensors", dtype=dtype)
    merge([tmp_path / "b.safetensors", tmp_path / "c.safetensors"], [], tmp_path / "d.safetensors")
    assert open_lora(tmp_path / "d.safetensors").dtype == result


def test_a_lora_taken_away_from_itself_is_nothing(tmp_path):
    a = lora_bases.lora(tmp_path / "a.safetensors", "sd15", ("attention",))
    merge([a, a], [1.0, -1.0], tmp_path / "b.safetensors", rank=2)
    assert max(matrix.norm() for matrix in changes(tmp_path / "b.safetensors").values()) < 1e-6


def test_what_does_not_go_together_is_refused(tmp_path):
    sd15 = lora_bases.lora(tmp_path / "sd15.safetensors", "sd15", ("attention",))
    klein = lora_bases.lora(tmp_path / "klein.safetensors", "klein", ("attention",))
    dora = lora_bases.lora(tmp_path / "dora.safetensors", "sd15", ("attention",), dora=True)
    large = tmp_path / "large.safetensors"
    save_file({name: torch.cat([tensor, tensor]) if "lora_up" in name else tensor
               for name, tensor in load_file(sd15).items()}, large, open_lora(sd15).metadata)
    cases = {(sd15, klein): "is for Flux.2 and .* for SD 1.5", (sd15, dora): "is a DoRA.*`bake`, and `extract`",
             (sd15, large): "different base models", (sd15, tmp_path / "no.safetensors"): "there is no file"}
    for files, message in cases.items():
        with pytest.raises(UserError, match=message):
            merge(files, [], tmp_path / "out.safetensors")
    for weights, message in {(1.0,): "2 files and 1 weights", (1.0, float("nan")): "must be numbers"}.items():
        with pytest.raises(UserError, match=message):
            merge([sd15, sd15], weights, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="give another --out"):
        merge([sd15, sd15], [], sd15)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_line_merges(tmp_path, capsys):
    files = [str(file) for file in two(tmp_path, "klein")]
    out = str(tmp_path / "c.safetensors")
    assert main(["merge", *files, "--weights", "1", "0.5", "--rank", "2", "--out", out]) == 0
    assert "format F1, rank 2" in (said := capsys.readouterr().out) and "is kept" in said
    assert main(["merge", *files, "--out", out, "--dtype", "bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["dtype"] == "bf16"
    assert lora_models.SIZES["klein"] == open_lora(tmp_path / "c.safetensors").family


def test_what_is_wrong_with_the_new_file_is_told(tmp_path, capsys):
    files = [str(file) for file in two(tmp_path, "sd15")]
    assert main(["merge", *files, "--weights", "0", "0", "--out", str(tmp_path / "c.safetensors")]) == 0
    assert "all layers are zero" in capsys.readouterr().out
