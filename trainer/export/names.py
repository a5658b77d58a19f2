"""The maps between a family's modules and the names that LoRA files give them, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_SGM_OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_SGM_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
               "conv_shortcut": "skip_connection"}


@dataclass(frozen=True)
class Place:
    """A key of a file and the modules whose rows, one below the other, its matrix changes.

    Rows name whatever a file can hold, not only what we train: a file of somebody else's is read by the same map.
    """

    key: str
    modules: tuple[str, ...]  # such as "unet.down_blocks.0…to_q", "text_encoder.text_model…q_proj"
    swapped: bool = False  # the halves of the rows change places between module and file (scale and shift)


class Naming:
    """One way of naming a family's modules; in its rows, `#` stands for a block's number.

    Where several rows name a module, the first is the one to write; the others are only read.
    """

    def __init__(self, rows: Sequence[Place]) -> None:
        self.rows = tuple(rows)
        self._by_key = _index((row.key, row) for row in rows)
        self._by_module = _index((module, row) for row in rows for module in row.modules)

    def of(self, module: str) -> Place | None:
        """Where a file keeps a module; None: no row."""
        return _find(canonical(module), self._by_module)

    def at(self, key: str) -> Place | None:
        """What a key of a file names; None: no row."""
        return _find(key, self._by_key)


def canonical(module: str) -> str:
    """A module's one name: a CLIP's path has `text_model`, which transformers ≥ 5.6 leaves out of its own."""
    return re.sub(r"^(text_encoder(?:_2)?)\.encoder\.layers\.", r"\1.text_model.encoder.layers.", module)


_Index = dict[str, list[tuple[re.Pattern[str], Place]]]


def _index(pairs: Iterable[tuple[str, Place]]) -> _Index:
    """Rows by their name with all numbers left out, so that a look-up tries only a few patterns."""
    found: _Index = {}
    for name, row in pairs:
        pattern = re.compile(re.escape(name).replace(r"\#", r"(\d+)"))
        found.setdefault(re.sub(r"\d+", "#", name), []).append((pattern, row))
    return found


def _find(name: str, index: _Index) -> Place | None:
    for pattern, row in index.get(re.sub(r"\d+", "#", name), ()):
        if match := pattern.fullmatch(name):
            numbers = match.groups()
            return Place(_numbered(row.key, numbers), tuple(_numbered(path, numbers) for path in row.modules),
                         row.swapped)
    return None


def _numbered(row: str, numbers: Sequence[str]) -> str:
    parts = row.split("#")
    return parts[0] + "".join(number + part for number, part in zip(numbers, parts[1:]))


# UNets: paths of diffusers, and of Stability's code ("sgm").


def _attention(place: str) -> list[str]:
    block = f"{place}.transformer_blocks.#"
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    heads = [f"{block}.{attn}.{part}" for attn in ("attn1", "attn2") for part in parts]
    return [f"{place}.proj_in", f"{place}.proj_out", *heads, f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]


def _resnet(place: str) -> list[str]:
    return [f"{place}.{part}" for part in _SGM_RESNET]


def _unet() -> list[str]:
    """Every Linear and Conv2d of diffusers' UNet2DConditionModel."""
    paths = [*_SGM_OUTER, "down_blocks.#.downsamplers.0.conv", "up_blocks.#.upsamplers.0.conv"]
    for place in ("down_blocks.#", "mid_block", "up_blocks.#"):
        paths += _attention(f"{place}.attentions.#") + _resnet(f"{place}.resnets.#")
    return paths


def _sgm(path: str, plain: int | None) -> str:
    """A UNet path (with its block's numbers) by the names of Stability's code.

    plain: the number of the up block without attention that has an upsampler, if there is one.
    """
    if path in _SGM_OUTER:
        return _SGM_OUTER[path]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", path):
        kind, j, rest = match.groups()
        return f"middle_block.{2 * int(j) if kind == 'resnets' else 1}.{_SGM_RESNET.get(rest, rest)}"
    way, i, kind, j, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", path).groups()
    place = 3 * int(i) + int(j)
    if kind == "downsamplers":
        return f"input_blocks.{place + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{place + 2}.{1 if int(i) == plain else 2}.conv"
    place, side = (place + 1, "input_blocks") if way == "down" else (place, "output_blocks")
    return f"{side}.{place}.{0 if kind == 'resnets' else 1}.{_SGM_RESNET.get(rest, rest)}"


def _sgm_unet(family: str) -> dict[str, str]:
    """diffusers' path → sgm's: blocks are numbered by arithmetic, so there is a row for each."""
    levels, plain = (4, 0) if family == "sd15" else (3, None)
    places = [(f"down_blocks.{i}", 2) for i in range(levels)] + [(f"up_blocks.{i}", 3) for i in range(levels)]
    paths = [*_SGM_OUTER, *_resnet("mid_block.resnets.0"), *_resnet("mid_block.resnets.1"),
             *_attention("mid_block.attentions.0")]
    for place, layers in places:
        for j in range(layers):
            paths += _resnet(f"{place}.resnets.{j}") + _attention(f"{place}.attentions.{j}")
        paths.append(f"{place}.{'downsamplers' if place.startswith('down') else 'upsamplers'}.0.conv")
    return {path: _sgm(path, plain) for path in paths}


# Flux: paths of diffusers, and of the authors' code ("native"), which keeps q, k and v in one matrix.


def _flux(generation: int) -> list[Place]:
    """Every Linear of diffusers' Flux (1) or Flux2 (2) transformer, by its native name."""
    double, single = "transformer_blocks.#", "single_transformer_blocks.#"
    rows = [(f"double_blocks.#.{native}", *(f"{double}.{part}" for part in parts))
            for native, *parts in (("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                                   ("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                                   ("img_attn.proj", "attn.to_out.0"), ("txt_attn.proj", "attn.to_add_out"))]
    inner = {1: ("net.0.proj", "net.2"), 2: ("linear_in", "linear_out")}[generation]
    rows += [(f"double_blocks.#.{stream}_mlp.{number}", f"{double}.{ff}.{part}")
             for stream, ff in (("img", "ff"), ("txt", "ff_context")) for number, part in zip((0, 2), inner)]
    embed = {1: "time_text_embed", 2: "time_guidance_embed"}[generation]
    embedders = (("time", "timestep"), ("guidance", "guidance"), ("vector", "text"))[: 4 - generation]
    rows += [(f"{native}_in.{way}_layer", f"{embed}.{name}_embedder.linear_{i}")
             for native, name in embedders for way, i in (("in", 1), ("out", 2))]
    rows += [("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")]
    if generation == 1:
        rows += [("double_blocks.#.img_mod.lin", f"{double}.norm1.linear"),
                 ("double_blocks.#.txt_mod.lin", f"{double}.norm1_context.linear"),
                 ("single_blocks.#.modulation.lin", f"{single}.norm.linear"),
                 ("single_blocks.#.linear1",
                  *(f"{single}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))),
                 ("single_blocks.#.linear2", f"{single}.proj_out")]
    else:
        rows += [(f"{name}.lin", f"{name}.linear") for name in ("double_stream_modulation_img",
                 "double_stream_modulation_txt", "single_stream_modulation")]
        rows += [("single_blocks.#.linear1", f"{single}.attn.to_qkv_mlp_proj"),
                 ("single_blocks.#.linear2", f"{single}.attn.to_out")]
    return [Place(native, tuple(paths)) for native, *paths in rows] + [
        Place("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)]


# Text encoders.


def _clip() -> list[str]:
    """Every Linear of a CLIP text encoder's layers, with the `text_model` that UIs look for."""
    layer = "text_model.encoder.layers.#"
    return [f"{layer}.self_attn.{part}" for part in CLIP_ATTENTION] + [f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"]


def _t5() -> list[str]:
    block = "encoder.block.#.layer"
    return ([f"{block}.0.SelfAttention.{part}" for part in "qkvo"]
            + [f"{block}.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")])


def _same(component: str, prefix: str, paths: Iterable[str]) -> list[Place]:
    """Keys that are the module's path behind a prefix: one of words and dots, or kohya's with `_` throughout."""
    def join(path: str) -> str:
        return (prefix + path).replace(".", "_") if prefix.endswith("_") else prefix + path

    return [Place(join(path), (f"{component}.{path}",)) for path in paths]


_KOHYA_TEXT = {  # component → kohya's prefix, and prefixes that are read too
    "sd15": {"text_encoder": ("lora_te_", "lora_te1_")},
    "sdxl": {"text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_",)},
    "flux1": {"text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_", "lora_te3_")},
    "flux2": {},
}
_NATIVE_TEXT = {
    "sd15": {"text_encoder": "clip_l"}, "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "flux1": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}, "flux2": {},
}


def _text(family: str, style: str) -> list[Place]:
    rows: list[Place] = []
    for component, prefixes in _KOHYA_TEXT[family].items():
        paths = _t5() if (family, component) == ("flux1", "text_encoder_2") else _clip()
        if style == "kohya":
            flat = [path.removeprefix("text_model.") for path in paths]  # named after transformers ≥ 5.6: a mistake
            for prefix in prefixes:
                rows += _same(component, prefix, paths)
            for prefix in prefixes if flat != paths else ():
                rows += [Place(place.key, of.modules) for place, of in
                         zip(_same(component, prefix, flat), _same(component, prefix, paths))]
        elif style == "native":
            rows += _same(component, f"text_encoders.{_NATIVE_TEXT[family][component]}.transformer.", paths)
        else:
            rows += _same(component, f"{component}.", paths)
    return rows


def _prefixed(prefix: str, component: str, rows: Iterable[Place]) -> list[Place]:
    """Native rows behind a prefix, and their modules as those of a component."""
    return [Place(_same("", prefix, [row.key])[0].key, tuple(f"{component}.{path}" for path in row.modules),
                  row.swapped) for row in rows]


@cache
def naming(family: str, style: str) -> Naming:
    """A family's modules in one style.

    "kohya": `lora_unet_…`, by diffusers' paths (UNets) or the authors' (Flux); "sgm": `lora_unet_…` by Stability's
    paths; "peft": diffusers' own; "native": `diffusion_model.…`; "bare": diffusers' paths without the transformer's
    prefix; "onetrainer": `lora_transformer_…`.
    """
    kohya = _text(family, "kohya")
    if family in ("sd15", "sdxl"):
        sgm = [Place(native, (path,)) for path, native in _sgm_unet(family).items()]
        return Naming({
            "kohya": lambda: _same("unet", "lora_unet_", _unet()) + kohya,
            "sgm": lambda: _prefixed("lora_unet_", "unet", sgm) + kohya,
            "peft": lambda: _same("unet", "unet.", _unet()) + _text(family, "peft"),
            "native": lambda: _prefixed("diffusion_model.", "unet", sgm) + _text(family, "native"),
        }[style]())
    native = _flux(1 if family == "flux1" else 2)
    paths = [path for row in native for path in row.modules]
    return Naming({
        "kohya": lambda: _prefixed("lora_unet_", "transformer", native) + kohya,
        "peft": lambda: _same("transformer", "transformer.", paths) + _text(family, "peft"),
        "native": lambda: _prefixed("diffusion_model.", "transformer", native) + _text(family, "native"),
        "bare": lambda: _same("transformer", "", paths),
        "onetrainer": lambda: _same("transformer", "lora_transformer_", paths) + kohya,
    }[style]())
