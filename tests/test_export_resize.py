"""LoRAs at other ranks: nearest changes, told losses, formats and readers kept."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import lora_bases, lora_models
from tests.test_export_merged import assert_same, fused
from trainer.errors import UserError
from trainer.export import layers, texts
from trainer.export.__main__ import main
from trainer.export.consumers import read_as
from trainer.export.lora_file import open_lora
from trainer.export.resize import resize
from trainer.export.writer import write

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"


def changes(path):
    """Module → ΔW in fp64."""
    return {name: up.double().flatten(1) @ down.double().flatten(1) for name, up, down, _ in open_lora(path).pairs()}


def lora(path, spectra, form="U1", dtype="fp32", family="sd15"):
    """A LoRA whose layers have these singular values."""
    torch.manual_seed(0)
    pairs = []
    for name, values in spectra.items():
        u, v = (torch.linalg.qr(torch.randn(24, len(values))).Q for _ in range(2))
        pairs.append((f"{KEY}.{name}" if family == "sd15" else name, u * torch.tensor(values), v.T, None))
    write(path, pairs, family=family, dtype=dtype, metadata={"ss_network_dim": "?", "ss_base_model_version": "sd_v1"},
          form=form)
    return path


SPECTRA = {"to_q": [4.0, 2.0, 1.0, 0.5], "to_k": [3.0, 3.0, 3.0, 3.0], "to_v": [8.0, 0.1, 0.1, 0.1]}


def test_every_layer_becomes_its_nearest_of_the_rank(tmp_path):
    source = lora(tmp_path / "a.safetensors", SPECTRA)
    done = resize(source, tmp_path / "b.safetensors", rank=2)
    kept = {cut.layer.rpartition(".")[2]: cut.kept for cut in done.cuts}
    assert kept == pytest.approx({"to_q": 20 / 21.25, "to_k": 0.5, "to_v": 64.01 / 64.03}, abs=1e-5)
    assert done.kept == pytest.approx((20 + 18 + 64.01) / (21.25 + 36 + 64.03), abs=1e-5)
    assert done.written.rank == 2 and {(cut.before, cut.after) for cut in done.cuts} == {(4, 2)}
    before, after = changes(source), changes(tmp_path / "b.safetensors")
    for name, matrix in before.items():
        u, s, v = torch.linalg.svd(matrix)
        assert torch.dist(after[name], matrix) == pytest.approx(float(s[2:].norm()), rel=1e-4)
    said = open_lora(tmp_path / "b.safetensors").metadata
    assert said["ss_network_dim"] == "2" and said["sshs_model_hash"] == done.written.model_hash
    assert texts.history(said)[0] == {"what": "resize", "rank": 2, "from": [layers.source(open_lora(source))]}


def test_energy_finds_one_rank_for_the_whole_file(tmp_path):
    """In all 121.28; the first singular values make 89, the second 13.01, the third 10.01, the last 9.26."""
    source = lora(tmp_path / "a.safetensors", SPECTRA)
    for share, rank in ((0.7, 1), (0.74, 2), (0.84, 2), (0.85, 3), (0.93, 4), (1.0, 4)):
        done = resize(source, tmp_path / "b.safetensors", energy=share)
        assert done.written.rank == rank and done.kept >= share - 1e-6, share


def test_dynamic_gives_each_layer_its_own_rank_at_one_alpha(tmp_path):
    source = lora(tmp_path / "a.safetensors", SPECTRA)
    done = resize(source, tmp_path / "b.safetensors", dynamic=0.9)
    assert {cut.layer.rpartition(".")[2]: cut.after for cut in done.cuts} == {"to_q": 2, "to_k": 4, "to_v": 1}
    found = open_lora(tmp_path / "b.safetensors")
    assert found.ranks == [1, 2, 4] and set(found.alphas.values()) == {4.0}
    before, after = changes(source), changes(tmp_path / "b.safetensors")
    torch.testing.assert_close(after[f"{KEY}.to_k"], before[f"{KEY}.to_k"])
    assert torch.dist(after[f"{KEY}.to_v"], before[f"{KEY}.to_v"]) == pytest.approx(0.03**0.5, rel=1e-3)
    assert read_as("comfyui", found).whole and "before version 0.40" in read_as("diffusers", found).faults[0].text


@pytest.mark.parametrize(("model", "form"), [("sd15", "U1"), ("sdxl", "U2"), ("flux1", "F1"), ("klein", "F6")])
def test_diffusers_fuses_a_dynamic_file_as_it_is_meant(tmp_path, model, form):
    source = lora_bases.lora(tmp_path / "a.safetensors", model, ("all",), form)
    resize(source, tmp_path / "b.safetensors", dynamic=0.8)
    assert len(open_lora(tmp_path / "b.safetensors").ranks) > 1
    base, wanted = lora_models.weights(model), {}
    for name, weight in base.items():
        wanted[name] = weight.double()
    for name, change in changes(tmp_path / "b.safetensors").items():
        wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + change.view(base[f"{name}.weight"].shape)
    if form != "F6" or model != "flux1":
        assert_same(fused(model, tmp_path / "b.safetensors"), wanted, base, 1e-4)


@pytest.mark.parametrize("choice", [{"rank": 3}, {"rank": 64}, {"energy": 1.0}, {"dynamic": 1.0}])
@pytest.mark.parametrize(("model", "form"), [("sd15", "U1"), ("sdxl", "U2"), ("flux1", "F5"), ("klein", "F1"),
                                             ("klein", "F6")])
def test_full_rank_changes_nothing(tmp_path, model, form, choice):
    source = lora_bases.lora(tmp_path / "a.safetensors", model, ("all", *(["text_encoder"] if "sd" in model else [])),
                             form)
    done = resize(source, tmp_path / "b.safetensors", **choice)
    assert done.kept == pytest.approx(1.0, abs=1e-9) and done.written.format == form
    before, after = changes(source), changes(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    for name, matrix in before.items():
        assert torch.dist(after[name], matrix) <= 1e-6 * matrix.norm(), name
    assert load_file(source).keys() == load_file(tmp_path / "b.safetensors").keys()


@pytest.mark.parametrize("form", ["F1", "F5", "F6"])
@pytest.mark.parametrize("fuse", [True, False])
def test_q_k_and_v_stay_one_matrix_where_they_are(tmp_path, form, fuse):
    """Stacked adapters keep one `down` for all parts; separate ones are cut each on its own."""
    source = lora_bases.lora(tmp_path / "a.safetensors", "klein", ("attention",), form, fuse=fuse)
    done = resize(source, tmp_path / "b.safetensors", rank=2)
    assert any("img_attn_qkv" in cut.layer for cut in done.cuts) == fuse
    found = open_lora(tmp_path / "b.safetensors")
    widest = 2 if fuse or form == "F1" else 6
    assert max(found.ranks) == widest
    downs = {name: down for name, _, down, _ in found.pairs()}
    block = "transformer.transformer_blocks.0.attn"
    assert torch.equal(downs[f"{block}.to_q"], downs[f"{block}.to_k"]) == fuse


def test_dora_keeps_its_magnitudes(tmp_path):
    source = lora_bases.lora(tmp_path / "a.safetensors", "sdxl", ("attention",), dora=True)
    resize(source, tmp_path / "b.safetensors", rank=1)
    old = {name: magnitude for name, _, _, magnitude in open_lora(source).pairs()}
    for name, _, down, magnitude in open_lora(tmp_path / "b.safetensors").pairs():
        assert torch.equal(magnitude, old[name]) and len(down) == 1


def test_convolutions_and_alpha_of_somebody_else(tmp_path):
    torch.manual_seed(0)
    key = "lora_unet_conv_in"
    save_file({f"{key}.lora_up.weight": torch.randn(8, 4, 1, 1), f"{key}.lora_down.weight": torch.randn(4, 4, 3, 3),
               f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"})
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=3)
    found = open_lora(tmp_path / "b.safetensors")
    assert found.alphas == {key: 3.0} and load_file(tmp_path / "b.safetensors")[f"{key}.lora_down.weight"].ndim == 4
    old, new = changes(tmp_path / "a.safetensors")["unet.conv_in"], changes(tmp_path / "b.safetensors")["unet.conv_in"]
    assert torch.dist(old, new) == pytest.approx(float(torch.linalg.svdvals(old)[3]), rel=1e-4)


FAULTS = {
    "no choice": ({}, "one of --rank, --energy and --dynamic"),
    "two choices": ({"rank": 2, "energy": 0.5}, "one of --rank, --energy and --dynamic"),
    "no rank": ({"rank": 0}, "give a whole number from 1 on"),
    "percent": ({"energy": 98.0}, "give a share between 0 and 1, such as 0.98"),
    "negative": ({"dynamic": -1.0}, "give a share between 0 and 1"),
}


@pytest.mark.parametrize(("choice", "message"), FAULTS.values(), ids=FAULTS)
def test_impossible_numbers_are_refused(tmp_path, choice, message):
    source = lora(tmp_path / "a.safetensors", {"to_q": [1.0]})
    with pytest.raises(UserError, match=message):
        resize(source, tmp_path / "b.safetensors", **choice)
    assert not (tmp_path / "b.safetensors").exists()


def test_what_is_not_finite_or_not_known_is_refused(tmp_path):
    source = lora(tmp_path / "a.safetensors", {"to_q": [1.0]})
    tensors = load_file(source)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, source)
    with pytest.raises(UserError, match="not finite"):
        resize(source, tmp_path / "b.safetensors", rank=1)
    save_file(tensors | {"alien": torch.ones(1)}, source)
    with pytest.raises(UserError, match="nothing is known of alien"):
        resize(source, tmp_path / "b.safetensors", rank=1)
    with pytest.raises(UserError, match="one of the files to read"):
        resize(source, source, rank=1)


def test_the_command_line_shows_what_is_lost(tmp_path, capsys):
    source = lora(tmp_path / "a.safetensors", SPECTRA)
    out = str(tmp_path / "b.safetensors")
    assert main(["resize", str(source), "--rank", "2", "--out", out]) == 0
    said = capsys.readouterr().out
    assert "in all 84.11% of the change's squared norm is kept: a relative error of 39.86%" in said
    assert said.index("50.00%      4 → 2") < said.index("94.12%      4 → 2")  # the largest loss first
    assert main(["resize", str(source), "--energy", "0.99", "--out", out, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rank"] == 4 and len(answer["cuts"]) == 3 and "SD 1.5" in answer["report"]["model"]
    assert main(["resize", str(source), "--out", out]) == 1
    assert "one of the arguments --rank --energy --dynamic is required" in capsys.readouterr().err
