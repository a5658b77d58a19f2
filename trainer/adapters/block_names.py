"""Short names of a model's repeated blocks, in the order in which they run: what ranks and spectra are told by."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.adapters.target import Target

# The beginning of a layer's name, and its block's name; of several that fit the first counts
BLOCKS = tuple((re.compile(pattern), name) for pattern, name in (
    (r"text_encoder(?P<a>_2)?\..*?layers\.(?P<b>\d+)\.", "text{a} {b}"),
    (r"unet\.(?P<a>down|up)_blocks\.(?P<b>\d+)\.attentions\.(?P<c>\d+)\.transformer_blocks\.(?P<d>\d+)\.",
     "{a} {b}.{c}.{d}"),
    (r"unet\.(?P<a>down|up)_blocks\.(?P<b>\d+)\.attentions\.(?P<c>\d+)\.", "{a} {b}.{c} projection"),
    (r"unet\.(?P<a>down|up)_blocks\.(?P<b>\d+)\.resnets\.(?P<c>\d+)\.", "{a} {b}.{c} convolution"),
    (r"unet\.(?P<a>down|up)_blocks\.(?P<b>\d+)\.(?:down|up)samplers\.", "{a} {b} resize"),
    (r"unet\.(?P<a>mid)_block\.attentions\.(?P<b>\d+)\.transformer_blocks\.(?P<c>\d+)\.", "{a} {b}.{c}"),
    (r"unet\.(?P<a>mid)_block\.attentions\.(?P<b>\d+)\.", "{a} {b} projection"),
    (r"unet\.(?P<a>mid)_block\.resnets\.(?P<b>\d+)\.", "{a} {b} convolution"),
    (r"transformer\.transformer_blocks\.(?P<a>\d+)\.", "double {a}"),
    (r"transformer\.single_transformer_blocks\.(?P<a>\d+)\.", "single {a}"),
))
STAGES = ("text", "text_2", "down", "mid", "up", "double", "single")  # in the order in which they run


def block_name(target: Target) -> str:
    """The short name of the block that a layer is in; its group's for a layer outside of all blocks."""
    for pattern, name in BLOCKS:
        if match := pattern.match(target.name):
            return name.format(**{key: value or "" for key, value in match.groupdict().items()})
    return target.group


def by_block(targets: Sequence[Target]) -> dict[str, list[int]]:
    """Numbers of the layers in each block, in the model's order."""
    blocks: dict[str, list[int]] = {}
    for number, target in enumerate(targets):
        blocks.setdefault(block_name(target), []).append(number)
    return {name: blocks[name] for name in sorted(blocks, key=_order)}


def _order(name: str) -> tuple[int, list[int], str]:
    """Stage, place in it, and what of the block: a UNet's convolutions come before the attention of their number."""
    stage, _, rest = name.partition(" ")
    place, _, part = rest.partition(" ")
    numbers = [int(number) for number in place.split(".") if number.isdecimal()]
    rank = STAGES.index(stage) if stage in STAGES else len(STAGES)
    if part == "resize":
        numbers.append(10_000)  # after all others of its stage
    return rank, numbers, part
