"""The written file is compared with the live adapter by a reading of its own; every kind of damage shows."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.export.verify import compare
from trainer.export.writer import write

TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CLIP_Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    return [(TO_Q, torch.randn(16, 3), torch.randn(3, 20), torch.rand(1, 20)),
            ("unet.conv_in", torch.randn(8, 2, 1, 1), torch.randn(2, 4, 3, 3), None),
            (CLIP_Q, torch.randn(12, 4) * 1e-3, torch.randn(4, 12), None)]


@pytest.fixture
def path(tmp_path, pairs):
    path = tmp_path / "a.safetensors"
    write(path, pairs, family="sd15", dtype="fp32", metadata={})
    return path


def change(path, name, value):
    """Rewrite one tensor of a file; None takes it out."""
    tensors = load_file(path)
    tensors.pop(name)
    save_file(tensors | ({} if value is None else {name: value}), path)


def test_a_faithful_file_agrees(path, pairs):
    found = compare(path, pairs, family="sd15")
    assert found.worst_rel_error < 1e-12 and found.unmatched == [] and found.zero == []
    assert found.tensors == 3 * 3 + 1 + 3 * 3  # with three untrained CLIP projections, which are zero


@pytest.mark.parametrize("dtype, least, most", [("fp16", 1e-5, 1e-3), ("bf16", 1e-4, 8e-3)])
def test_rounding_is_measured(tmp_path, pairs, dtype, least, most):
    write(tmp_path / "b.safetensors", pairs, family="sd15", dtype=dtype, metadata={})
    assert least < compare(tmp_path / "b.safetensors", pairs, family="sd15").worst_rel_error < most


def test_the_error_is_that_of_the_full_matrices(path, pairs):
    name, up, down, magnitude = pairs[0]
    moved = up + 0.01 * torch.randn_like(up)
    found = compare(path, [(name, moved, down, magnitude), *pairs[1:]], family="sd15")
    expected = ((up - moved).double() @ down.double()).norm() / (moved.double() @ down.double()).norm()
    assert found.worst_rel_error == pytest.approx(expected.item(), rel=1e-9)


def test_a_wrong_alpha_is_a_wrong_strength(path, pairs):
    change(path, f"{KEY_Q}.alpha", torch.tensor(2.0))  # rank 4: half the strength
    assert compare(path, pairs, family="sd15").worst_rel_error == pytest.approx(0.5)


def test_a_changed_or_missing_magnitude_shows(path, pairs):
    change(path, f"{KEY_Q}.dora_scale", pairs[0][3] * 1.1)
    assert compare(path, pairs, family="sd15").worst_rel_error == pytest.approx(0.1, rel=1e-5)
    change(path, f"{KEY_Q}.dora_scale", None)
    assert compare(path, pairs, family="sd15").worst_rel_error == math.inf


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_the_worst_error(path, pairs, place, number):
    name, up, down, magnitude = pairs[place]
    broken = up.clone()
    broken[0, 0] = number
    found = compare(path, [*pairs[:place], (name, broken, down, magnitude), *pairs[place + 1:]], family="sd15")
    assert math.isnan(found.worst_rel_error)


def test_a_magnitude_that_is_no_number_is_the_worst_error(path, pairs):
    name, up, down, magnitude = pairs[0]
    changed = [(name, up, down, magnitude * math.nan), *pairs[1:]]
    assert math.isnan(compare(path, changed, family="sd15").worst_rel_error)


def test_missing_modules_and_strange_tensors_are_named(path, pairs):
    change(path, f"{KEY_Q}.lora_up.weight", None)
    change(path, "lora_unet_conv_in.alpha", None)
    tensors = load_file(path)
    save_file(tensors | {"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, path)
    found = compare(path, pairs, family="sd15")
    assert sorted(found.unmatched) == sorted([
        "lora_unet_nowhere.lora_up.weight", f"{KEY_Q}.lora_down.weight", f"{KEY_Q}.alpha", f"{KEY_Q}.dora_scale",
        TO_Q])


def test_a_module_that_the_adapter_lacks_is_named_unless_zero(path, pairs):
    found = compare(path, pairs[1:], family="sd15")
    assert found.unmatched == [TO_Q]


def test_modules_without_effect_are_listed(tmp_path, pairs):
    name, up, down, _ = pairs[0]
    written = [(name, torch.zeros_like(up), down, None), *pairs[1:]]
    write(tmp_path / "z.safetensors", written, family="sd15", dtype="fp16", metadata={})
    found = compare(tmp_path / "z.safetensors", written, family="sd15")
    assert found.zero == [name] and found.worst_rel_error < 1e-3
    assert compare(tmp_path / "z.safetensors", [(name, up, down, None), *pairs[1:]],
                   family="sd15").worst_rel_error == pytest.approx(1.0)


def test_another_shape_is_not_compared_but_wrong(path, pairs):
    changed = [(TO_Q, torch.randn(15, 3), pairs[0][2], pairs[0][3]), *pairs[1:]]
    assert compare(path, changed, family="sd15").worst_rel_error == math.inf


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{not json", b"PK\x03\x04" * 10])
def test_a_broken_file_is_a_users_error(tmp_path, pairs, content):
    (tmp_path / "broken.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="broken.safetensors cannot be read as a safetensors file"):
        compare(tmp_path / "broken.safetensors", pairs, family="sd15")
