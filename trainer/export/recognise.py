"""Of which family a LoRA file is: by its names, then what it says of itself, then the shapes of its layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from trainer.errors import UserError
from trainer.export import formats, names
from trainer.export.header import Header
from trainer.export.names import Place

# What a file is when no family's map knows its names: part of a tensor's name, in words.
_OTHERS = {
    "hada_w1": "a LoHa file, whose factors are of another kind",
    "lokr_w": "a LoKr file, whose factors are of another kind",
    "lora_mid": "a LoCon file with Tucker factors",
    "oft_": "an OFT file",
    "lora_te1_": "an SDXL LoRA",
    "lora_te2_": "an SDXL LoRA",
    "double_blocks": "a Flux LoRA",
    "single_transformer_blocks": "a Flux LoRA",
    "joint_blocks": "an SD 3 LoRA",
    "distilled_guidance_layer": "a Chroma LoRA",
    "first_stage_model": "a base model, not a LoRA",
    "input_blocks": "a base model, or a LoRA with another family's names",
}
_VERSIONS = {  # beginnings of ss_base_model_version and modelspec.architecture
    "sd15": ("sd_v1", "sd_1.5", "stable-diffusion-v1"), "sdxl": ("sdxl", "stable-diffusion-xl"),
    "flux2": ("flux2", "Flux.2"), "flux1": ("flux1", "flux-1"),
}


def find_family(header: Header, grouped: Mapping[str, Mapping[str, str]], wanted: str) -> tuple[str, str]:
    """(family, naming's style) of a file's keys (key → part → tensor); `wanted`: the family that it must be, or "".

    Raises UserError when no family knows any of the keys.
    """
    counts = {(family, style): count for family in ([wanted] if wanted else formats.FAMILIES)
              for style, count in formats.known_keys(grouped, family).items() if count}
    if not counts:
        raise UserError(f"{header.path} {kind_in_words(header.tensors, wanted)}")
    most = max(counts.values())
    tied = [found for found, count in counts.items() if count == most]
    families = _by_shapes(_by_metadata({family for family, _ in tied}, header.metadata), header, grouped, tied)
    family = min(families, key=list(formats.FAMILIES).index)
    usual = formats.find(family, "auto").style
    styles = [style for found, style in tied if found == family]
    return family, usual if usual in styles else styles[0]


def family_of(header: Header) -> str:
    """The family of a LoRA file by its header. Raises UserError for what is no LoRA of a known family."""
    grouped: dict[str, dict[str, str]] = {}
    for tensor in header.tensors:
        if parts := formats.split(tensor):
            grouped.setdefault(parts[0], {})[parts[1]] = tensor
    return find_family(header, grouped, "")[0]


def kind_in_words(tensors: Collection[str], family: str) -> str:
    """What a file without a known module is, after its name in a message."""
    kind = next((words for part, words in _OTHERS.items() for name in tensors if part in name), None)
    known = formats.FAMILIES[family] if family else "LoRA"
    said = f"it is {kind}" if kind else f"it has names that a {known} file has not"
    example = next((f", such as {name[:100]}" for name in tensors), "")
    return f"cannot be read here: {said} ({len(tensors)} tensors{example})"


def _by_metadata(families: set[str], metadata: Mapping[str, str]) -> set[str]:
    """Those families that the file calls itself; all where it says nothing of use."""
    said = [metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")]
    found = {family for family in families if any(text.startswith(_VERSIONS[family]) for text in said)}
    return found or families


def _by_shapes(families: set[str], header: Header, grouped: Mapping[str, Mapping[str, str]],
               tied: Collection[tuple[str, str]]) -> set[str]:
    """Those families that no layer's shape speaks against; all where every one is contradicted."""
    if len(families) == 1:
        return families
    left = set()
    for family, style in tied:
        naming = names.naming(family, style)
        shapes = [(place, _shape(header, tensors)) for key, tensors in grouped.items()
                  if {"up", "down"} <= tensors.keys() and (place := naming.at(key))]
        if family in families and not any(_contradicts(family, place, shape) for place, shape in shapes):
            left.add(family)
    return left or families


def _shape(header: Header, tensors: Mapping[str, str]) -> tuple[int, ...]:
    up, down = (header.tensors[tensors[part]].shape for part in ("up", "down"))
    return (*up[:1], *down[1:])


def _contradicts(family: str, place: Place, shape: tuple[int, ...]) -> bool:
    """Whether a layer cannot be of this family: the text's width, kinds of projection, widths of an mlp."""
    module = place.modules[0]
    if len(shape) < 2:
        return False
    if family in ("sd15", "sdxl"):
        other = {"sd15": 2048, "sdxl": 768}[family]
        if module.endswith(("attn2.to_k", "attn2.to_v")):
            return shape[1] == other
        if module.endswith(("proj_in", "proj_out")) and ".attentions." in module:
            return (len(shape) == 4) == (family == "sdxl")
        return family == "sdxl" and module.startswith("unet.down_blocks.0.attentions.")
    if place.key.endswith(("_mlp.0", "_mlp_0")):
        return shape[0] != shape[1] * (4 if family == "flux1" else 6)
    if place.key.endswith("linear1"):
        return shape[0] != shape[1] * (7 if family == "flux1" else 9)
    return False
