"""Blocks by short names, in the order in which they run."""

from __future__ import annotations

import pytest
from torch import nn

from tests.bench import true_size
from trainer import families
from trainer.adapters.block_names import block_name, by_block
from trainer.adapters.target import Target


def target(name: str) -> Target:
    return Target(name, nn.Linear(2, 2), "some.group")


@pytest.mark.parametrize(("layer", "block"), [
    ("unet.down_blocks.1.attentions.0.transformer_blocks.9.attn1.to_out.0", "down 1.0.9"),
    ("unet.up_blocks.0.attentions.2.proj_in", "up 0.2 projection"),
    ("unet.up_blocks.2.resnets.1.conv_shortcut", "up 2.1 convolution"),
    ("unet.down_blocks.0.downsamplers.0.conv", "down 0 resize"),
    ("unet.mid_block.attentions.0.transformer_blocks.3.ff.net.2", "mid 0.3"),
    ("unet.mid_block.resnets.1.conv1", "mid 1 convolution"),
    ("transformer.transformer_blocks.18.attn.to_qkv", "double 18"),
    ("transformer.single_transformer_blocks.37.proj_out", "single 37"),
    ("text_encoder.text_model.encoder.layers.11.self_attn.q_proj", "text 11"),
    ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_2 0"),
    ("somewhere.else", "some.group"),
])
def test_a_layer_knows_its_block(layer: str, block: str) -> None:
    assert block_name(target(layer)) == block


@pytest.mark.parametrize(("model", "groups", "first", "last", "count"), [
    ("sdxl", ["attention"], "down 1.0.0", "up 1.2.1", 70), ("sd15", ["attention"], "down 0.0.0", "up 3.2.0", 16),
    ("flux1-dev", ["all"], "double 0", "single 37", 57)])
def test_the_blocks_of_true_models_come_in_their_order(model: str, groups: list[str], first: str, last: str,
                                                       count: int) -> None:
    size = true_size.SIZES[model]
    family = families.get(size.family)
    targets = family.adapter_targets({family.DENOISER: true_size.skeleton(size)}, groups)
    blocks = by_block(targets)
    assert (next(iter(blocks)), list(blocks)[-1], len(blocks)) == (first, last, count)
    assert sorted(number for numbers in blocks.values() for number in numbers) == list(range(len(targets)))


def test_the_middle_runs_between_down_and_up_and_ten_comes_after_nine() -> None:
    names = ["unet.up_blocks.0.attentions.0.transformer_blocks.10.x", "unet.mid_block.resnets.0.conv1",
             "unet.up_blocks.0.attentions.0.transformer_blocks.9.x", "unet.down_blocks.3.downsamplers.0.conv",
             "unet.down_blocks.3.resnets.1.conv1", "text_encoder.text_model.encoder.layers.0.x"]
    assert list(by_block([target(name) for name in names])) == [
        "text 0", "down 3.1 convolution", "down 3 resize", "mid 0 convolution", "up 0.0.9", "up 0.0.10"]
