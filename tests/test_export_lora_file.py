"""A LoRA opened: its family and format told from the file alone, its modules read one at a time."""

import pytest
import torch
from safetensors.torch import save_file

from trainer.errors import UserError
from trainer.export import formats, names
from trainer.export.lora_file import open_lora, swap_halves
from trainer.export.sizes import true_sizes
from trainer.export.writer import write


def written(path, family, model, form, part="attn"):
    """A file of the true model's layers in whose names `part` stands."""
    found = []
    for name, (m, n, *kernel) in true_sizes(family)[model].items():
        if part in name:
            found.append((name, torch.ones(m, 1, *[1] * len(kernel)), torch.ones(1, n, *kernel), None))
    write(path, found, family=family, dtype="fp16", metadata={}, form=form)
    return path


MODELS = [("sd15", "SD 1.5"), ("sdxl", "SDXL"), ("flux1", "Flux.1"), ("flux2", "Flux.2 klein 4B"),
          ("flux2", "Flux.2 dev")]


@pytest.mark.parametrize(("family", "model", "form"), [
    (family, model, form) for family, model in MODELS for form in formats.WRITTEN[family]])
def test_family_and_format_are_told_without_metadata(tmp_path, family, model, form):
    lora = open_lora(written(tmp_path / "a.safetensors", family, model, form))
    assert (lora.family, lora.format.name, lora.unknown, lora.incomplete) == (family, form, [], {})


@pytest.mark.parametrize(("family", "model", "form", "part"), [
    ("sd15", "SD 1.5", "U1", "attn2.to_k"), ("sdxl", "SDXL", "U1", "attn2.to_k"),
    ("sdxl", "SDXL", "U1", "mid_block.attentions.0.proj_in"),
    ("sd15", "SD 1.5", "U1", "mid_block.attentions.0.proj_in"),
    ("sd15", "SD 1.5", "U1", "down_blocks.0.attentions.0.transformer_blocks.0.ff"),
    ("flux1", "Flux.1", "F5", "transformer_blocks.3.ff."), ("flux2", "Flux.2 dev", "F6", "transformer_blocks.3.ff.")])
def test_few_layers_are_enough_where_their_shapes_speak(tmp_path, family, model, form, part):
    assert open_lora(written(tmp_path / "a.safetensors", family, model, form, part)).family == family


@pytest.mark.parametrize(("key", "value"), [("ss_base_model_version", "sdxl_base_v1-0"),
                                            ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora")])
def test_metadata_decide_where_names_and_shapes_leave_it_open(tmp_path, key, value):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_up.weight": torch.ones(8, 2), f"{name}.lora_down.weight": torch.ones(2, 8)}
    save_file(tensors, tmp_path / "a.safetensors", {key: value})
    assert open_lora(tmp_path / "a.safetensors").family == "sdxl"
    save_file(tensors, tmp_path / "a.safetensors", {key: "something else"})
    assert open_lora(tmp_path / "a.safetensors").family == "sd15"


@pytest.mark.parametrize(("flux", "mlp", "linear1"), [("flux1", 4, 7), ("flux2", 6, 9)])
def test_flux_models_are_told_apart_by_their_mlps(tmp_path, flux, mlp, linear1):
    for key, rows in {"double_blocks_0_img_mlp_0": mlp, "single_blocks_0_linear1": linear1}.items():
        save_file({f"lora_unet_{key}.lora_up.weight": torch.ones(rows * 8, 2),
                   f"lora_unet_{key}.lora_down.weight": torch.ones(2, 8)}, tmp_path / f"{key}.safetensors")
        assert open_lora(tmp_path / f"{key}.safetensors").family == flux


@pytest.mark.parametrize(("prefix", "down", "up", "alpha", "expected"), [
    ("unet.", "lora_A", "lora_B", False, "U3"), ("unet.", "lora_A", "lora_B", True, "U4"),
    ("diffusion_model.", "lora_A", "lora_B", False, "U6")])
def test_other_peoples_unet_formats_are_known(tmp_path, prefix, down, up, alpha, expected):
    style = {"unet.": "peft", "diffusion_model.": "native"}[prefix]
    key = names.naming("sd15", style).of("unet.mid_block.resnets.0.conv1").key
    tensors = {f"{key}.{down}.weight": torch.ones(2, 8, 3, 3), f"{key}.{up}.weight": torch.ones(8, 2, 1, 1)}
    save_file(tensors | ({f"{key}.alpha": torch.tensor(2.0)} if alpha else {}), tmp_path / "a.safetensors")
    lora = open_lora(tmp_path / "a.safetensors")
    assert lora.format.name == expected and [name for name, *_ in lora.pairs()] == ["unet.mid_block.resnets.0.conv1"]


@pytest.mark.parametrize(("prefix", "ending", "alpha", "expected"), [
    ("transformer.", ("lora_A", "lora_B"), True, "F2"), ("transformer.", ("lora_down", "lora_up"), True, "F3"),
    ("lora_transformer_", ("lora_down", "lora_up"), True, "F4"), ("diffusion_model.", ("lora_A", "lora_B"), True, "F7"),
    ("diffusion_model.", ("lora_down", "lora_up"), True, "F8"), ("", ("lora_A", "lora_B"), False, "F9")])
def test_other_peoples_flux_formats_are_known(tmp_path, prefix, ending, alpha, expected):
    styles = {"transformer.": "peft", "lora_transformer_": "onetrainer", "diffusion_model.": "native", "": "bare"}
    module = "transformer.single_transformer_blocks.1.proj_out"
    key = names.naming("flux1", styles[prefix]).of(module).key
    down, up = ending
    tensors = {f"{key}.{down}.weight": torch.ones(4, 40), f"{key}.{up}.weight": torch.ones(8, 4)}
    save_file(tensors | ({f"{key}.alpha": torch.tensor(2.0)} if alpha else {}), tmp_path / "a.safetensors",
              {"ss_base_model_version": "flux1"})
    lora = open_lora(tmp_path / "a.safetensors")
    ((name, folded, _, _),) = lora.pairs()
    assert (lora.format.name, name) == (expected, module)
    assert torch.equal(folded, torch.full((8, 4), 0.5 if alpha else 1.0))
    assert torch.equal(next(lora.pairs(fold=False))[1], torch.ones(8, 4))


def test_another_family_than_the_wanted_one_is_told(tmp_path):
    path = written(tmp_path / "a.safetensors", "flux1", "Flux.1", "F1", "_blocks.0.attn.to_q")
    with pytest.raises(UserError, match=r"a\.safetensors cannot be read here: it is a Flux LoRA \(4 tensors, such as"):
        open_lora(path, family="sd15")


def test_one_projection_without_a_change_is_left_out_of_fused_rows(tmp_path):
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    up = torch.zeros(24, 2)
    up[:8] = 1
    save_file({f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": up}, tmp_path / "a.safetensors")
    block = "transformer.transformer_blocks.0.attn"
    assert [name for name, *_ in open_lora(tmp_path / "a.safetensors").pairs()] == [f"{block}.to_q"]
    save_file({f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": 0 * up}, tmp_path / "a.safetensors")
    assert len(list(open_lora(tmp_path / "a.safetensors").pairs())) == 3


def test_halves_change_places():
    assert torch.equal(swap_halves(torch.arange(6)), torch.tensor([3, 4, 5, 0, 1, 2]))


@pytest.mark.parametrize(("name", "shape", "dtype", "fits"), [
    ("dora_scale", (1, 8), torch.float32, True), ("dora_scale", (12, 1), torch.float16, True),
    ("dora_scale", (1, 8, 1, 1), torch.bfloat16, True), ("dora_scale", (12, 1, 1, 1), torch.float32, True),
    ("lora_magnitude_vector", (12,), torch.float32, True),
    ("lora_magnitude_vector", (1, 12, 1, 1), torch.float32, True),
    ("dora_scale", (8,), torch.float32, False), ("dora_scale", (1, 12), torch.float32, False),
    ("dora_scale", (8, 1), torch.float32, False), ("dora_scale", (12, 8), torch.float32, False),
    ("dora_scale", (1, 8, 1), torch.float32, False), ("dora_scale", (1, 8, 3, 3), torch.float32, False),
    ("dora_scale", (), torch.float32, False), ("dora_scale", (1, 8), torch.int32, False),
    ("lora_magnitude_vector", (8,), torch.float32, False), ("lora_magnitude_vector", (12,), torch.int64, False)])
def test_magnitudes_that_do_not_fit_their_layer_are_refused(tmp_path, name, shape, dtype, fits):
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.lora_up.weight": torch.ones(12, 2), f"{key}.lora_down.weight": torch.ones(2, 8),
               f"{key}.{name}": torch.ones(shape, dtype=dtype)}, tmp_path / "a.safetensors")
    if fits:
        assert list(open_lora(tmp_path / "a.safetensors").entries) == [key]
        return
    with pytest.raises(UserError, match=rf"DoRA magnitudes of {key} are .*, which do not fit its layer of 12 outputs"):
        open_lora(tmp_path / "a.safetensors")


def halves(key, down="lora_down", up="lora_up"):
    return {f"{key}.{up}.weight": torch.ones(12, 2), f"{key}.{down}.weight": torch.ones(2, 12)}


@pytest.mark.parametrize("names", [("lora_down", "lora_B"), ("lora_A", "lora_up")])
def test_halves_of_two_kinds_are_no_pair(tmp_path, names):
    mixed, whole = (f"lora_te_text_model_encoder_layers_{i}_self_attn_q_proj" for i in (0, 1))
    save_file(halves(mixed, *names) | halves(whole), tmp_path / "a.safetensors")
    lora = open_lora(tmp_path / "a.safetensors", family="sd15")
    assert list(lora.entries) == [whole] and sorted(lora.incomplete[mixed]) == sorted(halves(mixed, *names))


@pytest.mark.parametrize(("family", "first", "second"), [
    ("sd15", halves("lora_unet_conv_out"), halves("lora_unet_conv_out", "lora_A", "lora_B")),
    *[(family, halves(f"{one}_text_model_encoder_layers_0_mlp_fc1"), halves(f"{other}_encoder_layers_0_mlp_fc1"))
      for family, one, other in (("sd15", "lora_te", "lora_te1_text_model"), ("sdxl", "lora_te1", "lora_te_text_model"),
                                 ("sd15", "lora_te", "lora_te"))]])
def test_two_changes_of_one_layer_are_refused_with_both_names(tmp_path, family, first, second):
    save_file(first | second, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors changes one layer twice, by lora_\w+\S* and by lora_\w+"):
        open_lora(tmp_path / "a.safetensors", family=family)
    for alone in (first, second):
        save_file(alone, tmp_path / "a.safetensors")
        assert len(open_lora(tmp_path / "a.safetensors", family=family).entries) == 1
