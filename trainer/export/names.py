"""The map between a family's module paths and the names in its LoRA file, read in both directions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

# A row is (module path, key in the file); `#` stands for a block's number. Rows name whatever the format can
# hold, not only what we train: a file of somebody else's is read by the same map.
Row = tuple[str, str]


@dataclass(frozen=True)
class Format:
    """How a LoRA file names its tensors: `key + suffix`. An alpha of None: the scale is folded into `up`."""

    name: str
    rows: tuple[Row, ...]
    down: str
    up: str
    alpha: str | None
    dora: str | None
    dtype: str  # the family's usual precision


def _attention(place: str) -> list[str]:
    block = f"{place}.transformer_blocks.#"
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    heads = [f"{block}.{attn}.{part}" for attn in ("attn1", "attn2") for part in parts]
    return [f"{place}.proj_in", f"{place}.proj_out", *heads, f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]


def _resnet(place: str) -> list[str]:
    return [f"{place}.{part}" for part in ("conv1", "conv2", "time_emb_proj", "conv_shortcut")]


def _unet() -> list[str]:
    """Every Linear and Conv2d of diffusers' UNet2DConditionModel."""
    paths = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
             "down_blocks.#.downsamplers.0.conv", "up_blocks.#.upsamplers.0.conv"]
    for place in ("down_blocks.#", "mid_block", "up_blocks.#"):
        paths += _attention(f"{place}.attentions.#") + _resnet(f"{place}.resnets.#")
    return paths


def _clip() -> list[str]:
    """Every Linear of a CLIP text encoder's layers, with the `text_model` that UIs look for."""
    layer = "text_model.encoder.layers.#"
    return [f"{layer}.self_attn.{part}" for part in CLIP_ATTENTION] + [f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"]


def _kohya(component: str, prefix: str, paths: list[str]) -> list[Row]:
    return [(f"{component}.{path}", f"{prefix}_{path}".replace(".", "_")) for path in paths]


FORMATS: dict[str, Format] = {
    "sd15": Format(
        "U1", tuple(_kohya("unet", "lora_unet", _unet()) + _kohya("text_encoder", "lora_te", _clip())),
        down=".lora_down.weight", up=".lora_up.weight", alpha=".alpha", dora=".dora_scale", dtype="fp16"),
}


def key_of(path: str, family: str) -> str | None:
    """The file's key of a module path ("unet.down_blocks.0…to_q", "text_encoder.text_model…q_proj"); None: no
    row.

    A CLIP path without `text_model`, as transformers ≥ 5.6 names its flattened encoder, means the same
    module.
    """
    path = re.sub(r"^(text_encoder(?:_2)?)\.encoder\.", r"\1.text_model.encoder.", path)
    return _translate(path, _compiled(family)[0])


def path_of(key: str, family: str) -> str | None:
    """The module path of a file's key; None: no row of the family's map."""
    return _translate(key, _compiled(family)[1])


def split(tensor: str, family: str) -> tuple[str, str] | None:
    """(key, part) of a tensor's name: part "down", "up", "alpha" or "dora"; None: not of this format."""
    form = FORMATS[family]
    for part, suffix in (("down", form.down), ("up", form.up), ("alpha", form.alpha), ("dora", form.dora)):
        if suffix and tensor.endswith(suffix):
            return tensor.removesuffix(suffix), part
    return None


Patterns = list[tuple[re.Pattern[str], str]]


@cache
def _compiled(family: str) -> tuple[Patterns, Patterns]:
    rows = FORMATS[family].rows
    return [_pattern(path, key) for path, key in rows], [_pattern(key, path) for path, key in rows]


def _pattern(source: str, target: str) -> tuple[re.Pattern[str], str]:
    return re.compile(re.escape(source).replace(r"\#", r"(\d+)")), target.replace("#", "{}")


def _translate(name: str, patterns: Patterns) -> str | None:
    for pattern, target in patterns:
        if match := pattern.fullmatch(name):
            return target.format(*match.groups())
    return None
