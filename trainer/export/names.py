"""The map between a family's module paths and the names in its LoRA file, read in both directions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_SGM_OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
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


def _sgm(path: str) -> str:
    """A UNet path (with its block's numbers) by the names of Stability's code; three levels, as SDXL has."""
    parts = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
             "conv_shortcut": "skip_connection"}
    if path in _SGM_OUTER:
        return _SGM_OUTER[path]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", path):
        kind, j, rest = match.groups()
        return f"middle_block.{2 * int(j) if kind == 'resnets' else 1}.{parts.get(rest, rest)}"
    way, i, kind, j, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", path).groups()
    place = 3 * int(i) + int(j)
    if kind == "downsamplers":
        return f"input_blocks.{place + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{place + 2}.2.conv"
    place, side = (place + 1, "input_blocks") if way == "down" else (place, "output_blocks")
    return f"{side}.{place}.{0 if kind == 'resnets' else 1}.{parts.get(rest, rest)}"


def _sdxl_unet() -> list[Row]:
    """Every Linear and Conv2d of SDXL's UNet: its blocks are numbered by arithmetic, so there is a row for each."""
    places = [(f"down_blocks.{i}", 2) for i in range(3)] + [(f"up_blocks.{i}", 3) for i in range(3)]
    paths = [*_SGM_OUTER, *_resnet("mid_block.resnets.0"), *_resnet("mid_block.resnets.1"),
             *_attention("mid_block.attentions.0")]
    for place, layers in places:
        for j in range(layers):
            paths += _resnet(f"{place}.resnets.{j}") + _attention(f"{place}.attentions.{j}")
        paths.append(f"{place}.{'downsamplers' if place.startswith('down') else 'upsamplers'}.0.conv")
    return [(f"unet.{path}", f"lora_unet_{_sgm(path)}".replace(".", "_")) for path in paths]


def _kohya(component: str, prefix: str, paths: list[str]) -> list[Row]:
    return [(f"{component}.{path}", f"{prefix}_{path}".replace(".", "_")) for path in paths]


def _flux(generation: int) -> list[str]:
    """Every Linear of diffusers' Flux (1) or Flux2 (2) transformer."""
    double, single = "transformer_blocks.#", "single_transformer_blocks.#"
    projections = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    paths = [f"{double}.attn.{part}" for part in projections]
    inner = {1: ("net.0.proj", "net.2"), 2: ("linear_in", "linear_out")}[generation]
    paths += [f"{double}.{ff}.{part}" for ff in ("ff", "ff_context") for part in inner]
    embed = {1: "time_text_embed", 2: "time_guidance_embed"}[generation]
    embedders = ("timestep", "guidance", "text")[: 4 - generation]
    paths += [f"{embed}.{name}_embedder.linear_{i}" for name in embedders for i in (1, 2)]
    paths += ["x_embedder", "context_embedder", "proj_out", "norm_out.linear"]
    if generation == 1:
        paths += [f"{double}.norm1.linear", f"{double}.norm1_context.linear", f"{single}.norm.linear"]
        return paths + [f"{single}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")]
    paths += ["double_stream_modulation_img.linear", "double_stream_modulation_txt.linear",
              "single_stream_modulation.linear"]
    return paths + [f"{single}.attn.to_qkv_mlp_proj", f"{single}.attn.to_out"]


def _peft(generation: int) -> Format:
    """F1: diffusers' own names, with the scale folded."""
    rows = tuple((f"transformer.{path}",) * 2 for path in _flux(generation))
    return Format("F1", rows, down=".lora_A.weight", up=".lora_B.weight", alpha=None, dora=None, dtype="bf16")


FORMATS: dict[str, Format] = {
    "sd15": Format(
        "U1", tuple(_kohya("unet", "lora_unet", _unet()) + _kohya("text_encoder", "lora_te", _clip())),
        down=".lora_down.weight", up=".lora_up.weight", alpha=".alpha", dora=".dora_scale", dtype="fp16"),
    "sdxl": Format(
        "U2", tuple(_sdxl_unet() + _kohya("text_encoder", "lora_te1", _clip())
                    + _kohya("text_encoder_2", "lora_te2", _clip())),
        down=".lora_down.weight", up=".lora_up.weight", alpha=".alpha", dora=".dora_scale", dtype="fp16"),
    "flux1": _peft(1),
    "flux2": _peft(2),
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
