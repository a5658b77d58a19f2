"""A file written in another format and back is the same file, and every key of it the same change in between."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.export import formats, names
from trainer.export.convert import convert
from trainer.export.lora_file import open_lora
from trainer.export.sizes import true_sizes
from trainer.export.writer import save, write

TRIPS = [(family, name, form) for family, models in {
    "sd15": ["SD 1.5"], "sdxl": ["SDXL"], "flux1": ["Flux.1"],
    "flux2": ["Flux.2 dev", "Flux.2 klein 4B", "Flux.2 klein 9B"]}.items() for name in models
    for form in formats.WRITTEN[family][1:]]


def pairs(family, name):
    """A pair of rank 1 for every layer of a true model, in numbers that fp16 holds."""
    generator, found = torch.Generator().manual_seed(0), []
    for module, (m, n, *kernel) in true_sizes(family)[name].items():
        up = torch.randn(m, 1, *[1] * len(kernel), generator=generator).half().float()
        down = torch.randn(1, n, *kernel, generator=generator).half().float()
        found.append((module, up, down, None))
    return found


@pytest.mark.parametrize(("family", "name", "form"), TRIPS)
def test_there_and_back_is_the_same_file(tmp_path, family, name, form):
    usual = formats.WRITTEN[family][0]
    first, second, third = (tmp_path / f"{number}.safetensors" for number in range(3))
    write(first, pairs(family, name), family=family, dtype="fp16", metadata={"ss_network_dim": "1", "note": "kept"})
    convert(first, form, second)
    assert open_lora(second).format.name == form and not open_lora(second).unknown
    convert(second, usual, third)
    before, after = load_file(first), load_file(third)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with safe_open(second, "pt") as file, safe_open(third, "pt") as last:
        assert file.metadata()["note"] == "kept" and file.metadata()["ss_output_name"] == "1"
        with safe_open(first, "pt") as origin:
            assert last.metadata()["sshs_model_hash"] == origin.metadata()["sshs_model_hash"]


def test_stacked_adapters_go_one_to_one_into_fused_keys(tmp_path):
    """An adapter over [q; k; v] has one `down`: fused keys keep its rank."""
    torch.manual_seed(0)
    pair = ("transformer.transformer_blocks.0.attn.to_qkv", torch.randn(3 * 16, 2), torch.randn(2, 16), None)
    write(tmp_path / "F1.safetensors", [pair], family="flux1", dtype="fp32", metadata={})
    for form in ("F5", "F6"):
        convert(tmp_path / "F1.safetensors", form, tmp_path / f"{form}.safetensors")
        tensors = load_file(tmp_path / f"{form}.safetensors")
        up = next(tensor for key, tensor in tensors.items() if key.endswith((".lora_up.weight", ".lora_B.weight")))
        down = next(tensor for key, tensor in tensors.items() if key.endswith((".lora_down.weight", ".lora_A.weight")))
        assert torch.equal(up, pair[1]) and torch.equal(down, pair[2]) and len(tensors) == (3 if form == "F5" else 2)
        convert(tmp_path / f"{form}.safetensors", "F1", tmp_path / "back.safetensors")
        assert load_file(tmp_path / "back.safetensors").keys() == load_file(tmp_path / "F1.safetensors").keys()


def test_an_alpha_of_somebody_else_is_kept_or_folded_in(tmp_path):
    torch.manual_seed(0)
    key, module = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
    up, down = torch.randn(8, 3), torch.randn(3, 6)
    save(tmp_path / "a.safetensors", {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down,
                                      f"{key}.alpha": torch.tensor(1.0)}, {"ss_network_alpha": "1.0"})
    convert(tmp_path / "a.safetensors", "U2", tmp_path / "b.safetensors")
    other = load_file(tmp_path / "b.safetensors")
    assert torch.equal(other["lora_unet_middle_block_1_proj_in.lora_up.weight"], up)
    assert other["lora_unet_middle_block_1_proj_in.alpha"] == 1.0
    ((name, folded, same, _),) = open_lora(tmp_path / "b.safetensors").pairs()
    torch.testing.assert_close(folded, up / 3)
    assert name == module and torch.equal(same, down)


def test_kohyas_flux_with_its_own_alpha_becomes_folded(tmp_path):
    torch.manual_seed(0)
    key, up, down = "lora_unet_double_blocks_0_img_attn_qkv", torch.randn(48, 4), torch.randn(4, 16)
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)},
              tmp_path / "a.safetensors", {"ss_base_model_version": "flux1"})
    convert(tmp_path / "a.safetensors", "F1", tmp_path / "b.safetensors")
    tensors = load_file(tmp_path / "b.safetensors")
    assert len(tensors) == 6 and not any("alpha" in name for name in tensors)
    found = torch.cat([tensors[f"transformer.transformer_blocks.0.attn.to_{part}.lora_B.weight"]
                       @ tensors[f"transformer.transformer_blocks.0.attn.to_{part}.lora_A.weight"] for part in "qkv"])
    torch.testing.assert_close(found, 0.5 * up @ down)


@pytest.mark.parametrize("prefix", ["lora_te_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"])
def test_mistaken_names_are_mended(tmp_path, prefix):
    save_file({f"{prefix}.lora_up.weight": torch.ones(8, 2), f"{prefix}.lora_down.weight": torch.ones(2, 8)},
              tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"})
    convert(tmp_path / "a.safetensors", "U1", tmp_path / "b.safetensors")
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in load_file(tmp_path / "b.safetensors")


def test_precision_can_be_chosen(tmp_path):
    write(tmp_path / "a.safetensors", [("unet.conv_in", torch.ones(8, 2), torch.ones(2, 4), None)], family="sd15",
          dtype="fp32", metadata={})
    convert(tmp_path / "a.safetensors", "U2", tmp_path / "b.safetensors")
    assert open_lora(tmp_path / "b.safetensors").dtype == "fp32"
    convert(tmp_path / "a.safetensors", "U2", tmp_path / "b.safetensors", dtype="bf16")
    assert open_lora(tmp_path / "b.safetensors").dtype == "bf16"


FAULTS = {
    "another family's format": ({}, "F5", "b", "F5 is no format for SD 1.5 files: choose one of U1, U2"),
    "over itself": ({}, "U2", "a", "is one of the files to read: give another --out"),
    "over a folder": ({}, "U2", "..", "is there already, as a folder: give another --out"),
    "a pickle's name": ({}, "U2", "b.ckpt", "take a .ckpt file for a pickle"),
    "alpha is no number": ({"lora_unet_conv_in.alpha": torch.tensor(torch.inf)}, "U2", "b", "are not finite numbers"),
    "unknown keys": ({"alien.weight": torch.ones(2)}, "U2", "b", "cannot be read whole: nothing is known of alien"),
}


@pytest.mark.parametrize(("extra", "form", "out", "message"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_converted_is_told(tmp_path, extra, form, out, message):
    write(tmp_path / "a.safetensors", [("unet.conv_in", torch.ones(8, 2), torch.ones(2, 4), None)], family="sd15",
          dtype="fp32", metadata={})
    save_file(load_file(tmp_path / "a.safetensors") | extra, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "a.safetensors", form, tmp_path / (out if "." in out else f"{out}.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_dora_of_fused_rows_and_of_peft_is_not_taken_apart(tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{key}.lora_up.weight": torch.ones(48, 2), f"{key}.lora_down.weight": torch.ones(2, 16),
               f"{key}.dora_scale": torch.ones(1, 16)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="one DoRA magnitude over several layers"):
        convert(tmp_path / "a.safetensors", "F1", tmp_path / "b.safetensors")
    key = "unet.mid_block.attentions.0.proj_in"
    save_file({f"{key}.lora_B.weight": torch.ones(48, 2), f"{key}.lora_A.weight": torch.ones(2, 16),
               f"{key}.lora_magnitude_vector": torch.ones(48)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="magnitudes of PEFT's kind"):
        convert(tmp_path / "a.safetensors", "U1", tmp_path / "b.safetensors")


@pytest.mark.parametrize("form", ["U1", "U2"])
def test_dora_of_the_input_axis_is_kept(tmp_path, form):
    magnitude = torch.rand(1, 6)
    write(tmp_path / "a.safetensors", [("unet.mid_block.attentions.0.proj_in", torch.ones(8, 2), torch.ones(2, 6),
                                        magnitude)], family="sdxl", dtype="fp32", metadata={}, form="U2")
    convert(tmp_path / "a.safetensors", form, tmp_path / "b.safetensors")
    place = names.naming("sdxl", formats.find("sdxl", form).style).of("unet.mid_block.attentions.0.proj_in")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{place.key}.dora_scale"], magnitude)


def test_magnitudes_change_places_with_the_halves_of_their_rows(tmp_path):
    """Of the output axis, in a layer whose scale and shift stand the other way round in the file."""
    key, up = "final_layer.adaLN_modulation.1", torch.randn(64, 2)
    magnitude = torch.arange(1.0, 65.0)[:, None]
    save_file({f"diffusion_model.{key}.lora_A.weight": torch.randn(2, 32), f"diffusion_model.{key}.lora_B.weight": up,
               f"diffusion_model.{key}.dora_scale": magnitude}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", "F1", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", "F6", tmp_path / "c.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["transformer.norm_out.linear.lora_B.weight"], torch.cat([up[32:], up[:32]]))
    assert found["transformer.norm_out.linear.dora_scale"].flatten().tolist() == [*range(33, 65), *range(1, 33)]
    assert torch.equal(load_file(tmp_path / "c.safetensors")[f"diffusion_model.{key}.dora_scale"], magnitude)
