"""How ComfyUI, A1111, Forge and diffusers read a LoRA file: what each of them drops, misreads or refuses."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from trainer.export import names
from trainer.export.lora_file import LoraFile

CONSUMERS = {"comfyui": "ComfyUI", "a1111": "A1111", "forge": "Forge", "diffusers": "diffusers"}
READERS = {  # who has the family at all
    "sd15": ("comfyui", "a1111", "forge", "diffusers"), "sdxl": ("comfyui", "a1111", "forge", "diffusers"),
    "flux1": ("comfyui", "forge", "diffusers"), "flux2": ("comfyui", "diffusers"),
}
FORGE_LIMIT = 12  # tensors without a place in the model; with more of them it refuses the file
UNET, FLUX = ("sd15", "sdxl"), ("flux1", "flux2")
ALL = ""


@dataclass(frozen=True)
class Fault:
    """What a consumer does wrong with some keys; strength: the share of the meant change that it applies there.

    None: the version of today applies it rightly; NaN: what it applies is another change.
    """

    text: str
    keys: tuple[str, ...]
    strength: float | None = 0.0


@dataclass
class Reading:
    """A file as one consumer reads it: key → share of the meant change that it applies, and why where it is not 1."""

    consumer: str
    strengths: dict[str, float]
    faults: list[Fault] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class NamesRule:
    """Layers (a regular expression for module paths) of files of these formats that a consumer does not read."""

    consumer: str
    families: tuple[str, ...]
    forms: tuple[str, ...]  # none: all
    modules: str
    text: str
    strength: float = 0.0


_OUTER = r"^transformer\.(x_embedder|context_embedder|proj_out|norm_out|time_text_embed)\b"
_SHARED = r"^transformer\.((double|single)_stream_modulation|time_guidance_embed)"
NAMES_RULES = (
    NamesRule("diffusers", ("sd15",), ("U2",), r"^unet\.(down|mid|up)_block",
              "raises an error or drops the UNet's blocks: of SD 1.5 it knows diffusers' block names only"),
    NamesRule("diffusers", ("sdxl",), ("U1",), r"^unet\.add_embedding\.", "drops the size embedding"),
    NamesRule("a1111", ("sdxl",), ("U1",), r"^unet\.(add_embedding\.|up_blocks\.0\.upsamplers\.)",
              "drops the size embedding and the first upsampler"),
    NamesRule("comfyui", UNET, ("U3", "U4"), r"\.attn[12]\.", "drops every attention layer"),
    NamesRule("forge", UNET, ("U3", "U4"), ALL, "refuses the file: it does not know these names"),
    NamesRule("a1111", UNET, ("U3", "U4"), ALL, "applies nothing: it does not know these names"),
    NamesRule("diffusers", UNET, ("U4",), ALL, "raises an error over the alpha keys"),
    NamesRule("diffusers", UNET, ("U6",), ALL, "applies nothing: it does not know these names"),
    NamesRule("a1111", UNET, ("U6",), ALL, "raises an error over these names"),
    NamesRule("diffusers", ("flux1",), ("F5", "F8"), _OUTER, "drops the layers outside the blocks"),
    NamesRule("diffusers", ("flux1",), ("F6", "F7", "F9"), ALL, "applies nothing: it does not know these names"),
    NamesRule("diffusers", ("flux1",), (), r"^text_encoder_2\.", "drops T5's layers"),
    NamesRule("comfyui", ("flux1",), ("F1", "F2", "F3"), r"^text_encoder_2\.", "drops T5's layers"),
    NamesRule("forge", ("flux1",), ("F1", "F2", "F3"), r"^text_encoder_2\.", "drops T5's layers"),
    NamesRule("forge", ("flux1",), ("F9",), ALL, "applies nothing: it does not know these names"),
    NamesRule("comfyui", ("flux2",), ("F1", "F2", "F3", "F4", "F9"), _SHARED,
              "drops the modulation and the time embedding; F6 holds them"),
    NamesRule("diffusers", ("flux2",), ("F2", "F7"), ALL, "raises an error over the alpha keys"),
    NamesRule("diffusers", ("flux2",), ("F3", "F4", "F8", "F9"), ALL, "applies nothing: it does not know these names"),
    NamesRule("diffusers", ("flux2",), ("F5",), r"modulation|guidance_embedder|norm_out",
              "drops the modulation, the guidance embedding and the last norm"),
    NamesRule("diffusers", ("flux2",), ("F6",), r"norm_out", "applies the last norm's scale and shift the wrong way "
              "round", math.nan),
)

Rule = Callable[[LoraFile, str, Collection[str]], Iterator[Fault]]


def read_as(consumer: str, lora: LoraFile, blocks: Collection[str] = ()) -> Reading:
    """What a consumer makes of a file. blocks: fused keys whose `up` is in blocks, which diffusers takes apart."""
    reading = Reading(consumer, dict.fromkeys(lora.entries, 1.0))
    if consumer not in READERS[lora.family]:
        reading.faults.append(Fault("does not have this kind of model", tuple(lora.entries)))
    else:
        for rule in RULES:
            reading.faults += [fault for fault in rule(lora, consumer, blocks) if fault.keys]
    _forge_limit(lora, reading)
    for fault in reading.faults:
        for key in fault.keys:
            if fault.strength is not None and key in reading.strengths:
                reading.strengths[key] *= fault.strength
    return reading


def _forge_limit(lora: LoraFile, reading: Reading) -> None:
    if reading.consumer != "forge":
        return
    lost = {key for fault in reading.faults if fault.strength == 0.0 for key in fault.keys}
    count = sum(len(lora.entries[key].tensors) if key in lora.entries else 1 for key in lost)
    if FORGE_LIMIT < count and lost != set(lora.entries):
        reading.faults.append(Fault(f"refuses the whole file: {count} of its tensors have no place in the model, and "
                                    f"it takes no more than {FORGE_LIMIT}", tuple(lora.entries)))


def _names(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    for rule in NAMES_RULES:
        if rule.consumer == consumer and lora.family in rule.families and lora.format.name in (
                rule.forms or (lora.format.name,)):
            keys = _keys(lora, lambda module, rule=rule: re.search(rule.modules, module) is not None)
            yield Fault(rule.text, keys, rule.strength)


def _unmatched(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    if consumer == "diffusers" and lora.format.name in ("U1", "U2") and (lora.unknown or lora.incomplete):
        yield Fault("raises an error over tensors that it does not know, or that lack their other half",
                    (*lora.unknown, *lora.incomplete, *lora.entries))
        return
    yield Fault("finds no layer for tensors of unknown names, and drops them", tuple(lora.unknown))
    yield Fault("drops layers of which one half is missing", tuple(lora.incomplete))


def _endings(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    """Endings of the kind that does not go with the names: ComfyUI and Forge take either, layer by layer."""
    if lora.family == "flux1" and lora.format.style == "peft":  # which diffusers takes either of, too
        return
    right = all(entry.tensors["down"].endswith(lora.format.down) for entry in lora.entries.values())
    if not right and consumer in ("a1111", "diffusers"):
        yield Fault("raises an error over endings that do not go with these names: kohya's are lora_down and lora_up, "
                    "PEFT's lora_A and lora_B", tuple(lora.entries))


def _clip_names(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    """Names of text encoders that only some consumers look for."""
    if consumer != "diffusers":
        keys = tuple(key for key in lora.entries if re.match(r"lora_te\d?_encoder_layers_", key))
        yield Fault("drops the text encoder: its names lack text_model", keys)
    if consumer == "a1111" and lora.family == "sdxl":
        keys = tuple(key for key in lora.entries if key.startswith("lora_te_text_model"))
        yield Fault("drops the first text encoder, which SDXL files call lora_te1", keys)


def _clip_attention(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    """CLIP layers of kohya's files need all of q, k, v and out."""
    if lora.format.ending != "kohya":
        return
    layers: dict[str, dict[str, str]] = {}
    for key, entry in lora.entries.items():
        layer, found, part = entry.place.modules[0].rpartition(".self_attn.")
        if found:
            layers.setdefault(layer, {})[part] = key
    for component in ("text_encoder", "text_encoder_2"):
        own = {layer: parts for layer, parts in layers.items() if layer.startswith(component + ".")}
        if consumer == "diffusers" and own and not any("out_proj" in parts for parts in own.values()):
            if _keys(lora, lambda module, own=component: module.startswith(own + ".") and ".mlp." in module):
                yield Fault("drops q, k and v of a text encoder none of whose layers has out_proj",
                            tuple(key for parts in own.values() for key in parts.values()))
            else:
                yield Fault("raises an error over a text encoder with q, k or v and without out_proj",
                            tuple(lora.entries))
        if consumer == "a1111" and component == "text_encoder_2":
            yield Fault("drops attention of the second text encoder where a layer lacks one of q, k, v and out",
                        tuple(key for parts in own.values() if len(parts) < len(names.CLIP_ATTENTION)
                              for key in parts.values()))


def _mixed_alpha(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    """diffusers' attention layers all get the most frequent alpha of their model."""
    if consumer != "diffusers" or len(set(lora.alphas.values())) < 2:
        return
    if lora.format.name == "F2":
        usual = Counter(lora.alphas.values()).most_common(1)[0][0]
        keys = tuple(key for key, alpha in lora.alphas.items() if key.endswith("proj_out") and alpha != usual)
        yield Fault("mixes up the alpha of layers called proj_out where alpha differs", keys, math.nan)
    if lora.format.name not in ("U1", "U2"):
        return
    modules = {key: lora.entries[key].place.modules[0] for key in lora.alphas}
    for component in dict.fromkeys(module.partition(".")[0] for module in modules.values()):
        own = {key: module for key, module in modules.items() if module.startswith(component + ".")}
        usual = Counter(lora.alphas[key] for key in own).most_common(1)[0][0]
        ratios = {key: usual / lora.alphas[key] if lora.alphas[key] else math.nan for key, module in own.items()
                  if re.search(r"\.(attn[12]|self_attn)\.", module) and lora.alphas[key] != usual}
        for strength, keys in _grouped(ratios).items():
            yield Fault(f"applies attention layers at {strength:.3g} times the strength meant: where alpha differs, it "
                        f"takes the most frequent one, {usual:g}, for all of them", keys, strength)


def _dropped_alpha(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    if consumer != "diffusers" or lora.family != "flux1":
        return
    if lora.format.name == "F4":
        if len(lora.alphas) < len(lora.entries) or _keys(lora, lambda module: ".attn." not in module):
            yield Fault("raises an error in these names over layers other than attention, or without alpha",
                        tuple(lora.entries))
    elif lora.format.style == "peft" and any("lora_down" in entry.tensors["down"] for entry in lora.entries.values()):
        for scale, keys in _grouped({key: lora.scale(key) for key in lora.entries if lora.scale(key) != 1.0}).items():
            strength = 1 / scale if scale else math.nan
            yield Fault(f"ignores alpha in these names: {strength:.3g} times the strength meant", keys, strength)


def _missing_alpha(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    """A layer without alpha counts as alpha = rank; diffusers gives it the alpha of the others."""
    if lora.format.ending != "kohya":
        return
    missing = tuple(key for key in lora.entries if key not in lora.alphas)
    if not lora.alphas:
        said = _said_scale(lora.metadata)
        if missing and said not in (None, 1.0):
            yield Fault(f"applies {1 / said:.3g} times the strength meant: the file says alpha / rank = {said:g}, and "
                        "has no alpha beside its layers", missing, 1 / said)
        return
    usual = Counter(lora.scale(key) for key in lora.alphas).most_common(1)[0][0]
    if missing and usual not in (0.0, 1.0) and not (consumer == "diffusers" and lora.family in UNET):
        yield Fault(f"applies layers without alpha at {1 / usual:.3g} times the strength of the others", missing,
                    1 / usual)


def _said_scale(metadata: Mapping[str, str]) -> float | None:
    """alpha / rank by sd-scripts' metadata; None where it does not say."""
    try:
        scale = float(metadata["ss_network_alpha"]) / float(metadata["ss_network_dim"])
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return scale if math.isfinite(scale) and scale > 0 else None


def _mixed_rank(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    if consumer != "diffusers":
        return
    ranks = {key: entry.rank // (len(entry.place.modules) if key in blocks and lora.format.name == "F5" else 1)
             for key, entry in lora.entries.items()}
    if len(set(ranks.values())) > 1:
        usual = Counter(ranks.values()).most_common(1)[0][0]
        yield Fault("before version 0.40 takes one layer's rank for all, and applies the others at a wrong strength",
                    tuple(key for key, rank in ranks.items() if rank != usual), None)


def _adapter_metadata(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    """diffusers' own metadata: an error beside alphas, and unknown to all others."""
    text = lora.metadata.get("lora_adapter_metadata")
    if text is None:
        return
    if lora.format.ending == "kohya" or lora.alphas:
        if consumer == "diffusers":
            yield Fault("raises an error: alphas and lora_adapter_metadata cannot stand in one file",
                        tuple(lora.entries))
        return
    try:
        config = {key: float(value) for key, value in json.loads(text).items() if key.endswith((".r", ".lora_alpha"))}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        yield Fault("cannot read lora_adapter_metadata", tuple(lora.entries) if consumer == "diffusers" else ())
        return
    for name, alpha in config.items():
        part, rank = name.removesuffix(".lora_alpha"), config.get(name.removesuffix("lora_alpha") + "r", 0.0)
        if name.endswith(".lora_alpha") and rank and alpha and alpha != rank and consumer != "diffusers":
            yield Fault(f"does not read lora_adapter_metadata, which says alpha {alpha:g} for rank {rank:g}: "
                        f"{rank / alpha:.3g} times the strength meant",
                        _keys(lora, lambda module, part=part: module.startswith(part + ".")), rank / alpha)


def _dora(lora: LoraFile, consumer: str, blocks: Collection[str]) -> Iterator[Fault]:
    """Magnitudes: kohya's along the input axis are read by all but diffusers, PEFT's by diffusers alone."""
    inputs, outputs, vectors = [], [], []
    for key, entry in lora.entries.items():
        if "vector" in entry.parts:
            vectors.append(key)
        elif "dora" in entry.parts:
            (inputs if entry.parts["dora"].shape[:2] == (1, entry.weight[1]) else outputs).append(key)
    if consumer == "diffusers":
        yield Fault("cannot read DoRA magnitudes, and applies a plain LoRA instead", tuple(inputs + outputs), math.nan)
        return
    yield Fault("does not read PEFT's DoRA magnitudes, and applies a plain LoRA instead", tuple(vectors), math.nan)
    effect = ("takes DoRA magnitudes of the output axis along the wrong axis: the pictures are garbage"
              if consumer == "a1111" else "divides DoRA magnitudes of the output axis by the base's norms instead of "
              "the changed ones: up to a quarter of the change is wrong")
    yield Fault(effect, tuple(outputs), math.nan)


RULES: tuple[Rule, ...] = (_names, _unmatched, _endings, _clip_names, _clip_attention, _mixed_alpha, _dropped_alpha,
                           _missing_alpha, _mixed_rank, _adapter_metadata, _dora)


def _keys(lora: LoraFile, wanted: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(key for key, entry in lora.entries.items() if any(wanted(module) for module in entry.place.modules))


def _grouped(values: Mapping[str, float]) -> dict[float, tuple[str, ...]]:
    return {value: tuple(key for key, own in values.items() if own == value) for value in set(values.values())}
