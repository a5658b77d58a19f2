"""LoRA files, ours and others', read as pairs to continue from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.export import reader, writer

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.up_blocks.1.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def pairs_of(*names: str, rank: int = 3) -> list[tuple]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {Q: ((8, rank), (rank, 6)), CONV: ((8, rank, 1, 1), (rank, 4, 3, 3)), TEXT: ((8, rank), (rank, 8))}
    return [(name, *(noise(*shape) for shape in shapes[name]), None) for name in names]


def written(folder: Path, pairs: list[tuple]) -> Path:
    writer.write(folder / "a.safetensors", pairs, family="sd15", dtype="fp32", metadata={})
    return folder / "a.safetensors"


def test_what_was_written_is_read_back_to_the_bit(tmp_path):
    pairs = pairs_of(Q, CONV, TEXT)
    pairs[0] = (*pairs[0][:3], torch.rand(1, 6))
    again = reader.read(written(tmp_path, pairs), family="sd15")
    assert set(again) == {Q, CONV, TEXT}  # and no projection of zeros that only the format asks for
    for name, *parts in pairs:
        for part, got in zip(parts, again[name]):
            assert (part is None) == (got is None) and (part is None or torch.equal(part, got))


def test_another_alpha_is_folded_into_up(tmp_path):
    file = written(tmp_path, pairs_of(Q))
    tensors = load_file(file)
    before = reader.read(file, family="sd15")[Q]
    tensors[f"{KEY}.alpha"] = torch.tensor(1.5)  # of a rank of 3
    save_file(tensors, file)
    up, down, _ = reader.read(file, family="sd15")[Q]
    assert torch.equal(up, before[0] / 2) and torch.equal(down, before[1])
    del tensors[f"{KEY}.alpha"]
    save_file(tensors, file)
    assert torch.equal(reader.read(file, family="sd15")[Q][0], before[0])


def test_half_precision_is_widened_before_it_is_scaled(tmp_path):
    file = written(tmp_path, pairs_of(Q))
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    assert {part.dtype for part in reader.read(file, family="sd15")[Q][:2]} == {torch.float32}


FAULTS = {
    "half a pair": ({f"{KEY}.lora_up.weight": None}, r"a\.safetensors is not whole: \S+to_q lacks up or down"),
    "not finite": ({f"{KEY}.lora_up.weight": torch.full((8, 3), torch.nan)}, "numbers that are not finite, in unet"),
    "all zero": ({f"{KEY}.lora_up.weight": torch.zeros(8, 3)}, "changes nothing"),
    "SDXL": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}, "it is an SDXL LoRA"),
    "Flux": ({"lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(2, 2)}, "it is a Flux LoRA"),
    "LoHa": ({f"{KEY}.hada_w1_a": torch.ones(2, 2)}, r"it is a LoHa file.*\(1 tensors, such as lora_"),
    "something": ({"alien.weight": torch.ones(2)}, "it has names that a SD 1.5 file has not"),
}


@pytest.mark.parametrize("change, message", FAULTS.values(), ids=FAULTS)
def test_a_file_that_cannot_be_continued_is_a_plain_error(tmp_path, change, message):
    file = written(tmp_path, pairs_of(Q))
    tensors = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(UserError, match=rf"^adapter\.start_from: .*{message}"):
        reader.read(file, family="sd15")


def test_no_file_and_no_safetensors_file_are_plain_errors(tmp_path):
    with pytest.raises(UserError, match="no file .*nothing.safetensors"):
        reader.read(tmp_path / "nothing.safetensors", family="sd15")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        reader.read(tmp_path / "text.safetensors", family="sd15")
