"""LoRAs out of two checkpoints: what was merged comes back, across layouts, with text encoders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import lora_bases
from tests.test_export_resize import changes
from trainer.errors import UserError
from trainer.export.__main__ import main
from trainer.export.bake import bake
from trainer.export.extract import extract
from trainer.export.lora_file import open_lora
from trainer.export.report import examine

GROUPS = {"sd15": ("all", "text_encoder"), "sdxl": ("all", "text_encoder"), "flux1": ("all",), "klein": ("all",)}


@pytest.fixture(scope="module", params=GROUPS)
def case(request, tmp_path_factory):
    """A base and the same with a LoRA of rank 3 in it, as folders and as single files."""
    model, path = request.param, tmp_path_factory.mktemp(request.param)
    lora = lora_bases.lora(path / "lora.safetensors", model, GROUPS[model])
    base = lora_bases.folder(path / "base", model)
    bake(base, [lora], [], path / "tuned")
    files = [lora_bases.file(path / f"{name}.safetensors", path / name, model) for name in ("base", "tuned")]
    return model, lora, (base, path / "tuned"), files


@pytest.mark.parametrize("kinds", ["folders", "files", "folder and file"])
def test_merge_then_extract_returns_the_change(case, tmp_path, kinds):
    model, lora, folders, files = case
    base, tuned = {"folders": folders, "files": files, "folder and file": (folders[0], files[1])}[kinds]
    done = extract(base, tuned, tmp_path / "out.safetensors", rank=9, dtype="fp32")
    wanted, found = changes(lora), changes(tmp_path / "out.safetensors")
    wanted = {name: change for name, change in wanted.items() if change.any()}
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():  # W + ΔW was rounded to fp32
        assert torch.dist(found[name], change) <= 1e-5 * change.norm() + 1e-5, name
    assert done.others == [] and done.kept > 1 - 1e-6


def test_energy_and_rank_bound_each_layer(case, tmp_path):
    model, lora, folders, _ = case
    done = extract(*folders, tmp_path / "out.safetensors", rank=2, dtype="fp32")
    assert done.written.rank == 2 and max(cut.after for cut in done.cuts) == 2
    found = changes(tmp_path / "out.safetensors")
    for name, change in changes(lora).items():
        if change.any():
            bound = torch.linalg.svdvals(change)[2:].norm() * (1 + 1e-3) + 1e-5
            assert torch.dist(found[name], change) <= bound, name
    done = extract(*folders, tmp_path / "out.safetensors", rank=9, energy=0.5)
    assert {cut.after for cut in done.cuts} <= {1, 2} and all(cut.kept >= 0.5 - 1e-6 for cut in done.cuts)


def test_the_file_says_what_it_is_and_is_read(tmp_path):
    folders = [lora_bases.folder(tmp_path / name, "klein") for name in ("base", "tuned")]
    file = next((folders[1] / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    torch.manual_seed(0)
    name = "transformer_blocks.0.attn.to_q.weight"
    tensors[name] += torch.randn(len(tensors[name]), 1) @ torch.randn(1, tensors[name].shape[1])
    tensors["transformer_blocks.0.attn.norm_q.weight"] *= 2
    save_file(tensors, file, {"format": "pt"})
    done = extract(*folders, tmp_path / "out.safetensors", rank=4, to="F6")
    assert done.others == ["transformer_blocks.0.attn.norm_q.weight"]
    assert [(cut.layer, cut.after) for cut in done.cuts] == [(f"transformer.{name.removesuffix('.weight')}", 1)]
    lora = open_lora(tmp_path / "out.safetensors")
    assert lora.metadata["ss_base_model_version"] == "flux2" and lora.format.name == "F6" and lora.dtype == "bf16"
    report = examine(tmp_path / "out.safetensors", base=folders[0])
    assert report.good, report


def test_what_cannot_be_compared_is_refused(tmp_path):
    sd15, klein = (lora_bases.folder(tmp_path / name, name) for name in ("sd15", "klein"))
    single = lora_bases.file(tmp_path / "single.safetensors", sd15, "sd15")
    other = tmp_path / "other.safetensors"
    save_file({name: torch.cat([tensor, tensor]) if name.endswith("proj_in.weight") else tensor
               for name, tensor in load_file(single).items()}, other)
    cases = [((sd15, klein), {}, "is SD 1.5 and .* is Flux.2: both must be of one family"),
             ((sd15, single), {}, "have the same weights in every layer"),
             ((sd15, other), {}, "they are models of other sizes"),
             ((sd15, single), {"rank": 0}, "--rank 0"), ((sd15, single), {"energy": 2.0}, "--energy 2"),
             ((sd15, tmp_path / "no"), {}, "there is no file"), ((tmp_path, sd15), {}, "is not a"),
             ((single, sd15), {"out": single}, "give another --out")]
    for models, options, message in cases:
        with pytest.raises(UserError, match=message):
            extract(*models, options.get("out", tmp_path / "out.safetensors"), rank=options.get("rank", 4),
                    energy=options.get("energy", 1.0))
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_line_extracts(case, tmp_path, capsys):
    _, _, folders, _ = case
    arguments = ["extract", *map(str, folders), "--rank", "4", "--out", str(tmp_path / "a.safetensors")]
    assert main([*arguments, "--exact"]) == 0
    assert "of the change's squared norm is kept" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["others"] == []
