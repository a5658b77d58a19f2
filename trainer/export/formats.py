"""The kinds of LoRA file: which names, which endings, whether alpha stands beside; told apart by a file's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer import schema
from trainer.errors import UserError
from trainer.export import names
from trainer.export.names import Naming

FAMILIES = {"sd15": "SD 1.5", "sdxl": "SDXL", "flux1": "Flux.1", "flux2": "Flux.2"}
DTYPES = {"sd15": "fp16", "sdxl": "fp16", "flux1": "bf16", "flux2": "bf16"}  # a family's usual precision

_ENDINGS = {  # of a tensor's name: kind of ending, part
    ".lora_down.weight": ("kohya", "down"), ".lora_up.weight": ("kohya", "up"),
    ".lora_A.weight": ("peft", "down"), ".lora_B.weight": ("peft", "up"),
    ".alpha": ("", "alpha"), ".dora_scale": ("", "dora"),
    ".lora_magnitude_vector.weight": ("peft", "vector"), ".lora_magnitude_vector": ("peft", "vector"),
    ".lora_mid.weight": ("kohya", "mid"),
}


@dataclass(frozen=True)
class Format:
    """How a file names its tensors (`key + ending`), and whether it keeps alpha or has it folded into `up`."""

    name: str
    style: str  # of names.naming
    ending: str  # "kohya" or "peft"
    alpha: bool
    words: str

    @property
    def down(self) -> str:
        return ".lora_down.weight" if self.ending == "kohya" else ".lora_A.weight"

    @property
    def up(self) -> str:
        return ".lora_up.weight" if self.ending == "kohya" else ".lora_B.weight"


_UNET = (
    Format("U1", "kohya", "kohya", True, "kohya's, with diffusers' block names"),
    Format("U2", "sgm", "kohya", True, "kohya's, with Stability's block names"),
    Format("U3", "peft", "peft", False, "diffusers' own (PEFT)"),
    Format("U4", "peft", "peft", True, "diffusers' own (PEFT) with alpha beside"),
    Format("U6", "native", "peft", True, "Stability's names with a prefix"),
)
_FLUX = (
    Format("F1", "peft", "peft", False, "diffusers' own (PEFT), alpha folded in"),
    Format("F2", "peft", "peft", True, "diffusers' own (PEFT) with alpha beside"),
    Format("F3", "peft", "kohya", True, "diffusers' names with kohya's endings"),
    Format("F4", "onetrainer", "kohya", True, "OneTrainer's older one"),
    Format("F5", "kohya", "kohya", True, "kohya's, with the authors' names"),
    Format("F6", "native", "peft", False, "ComfyUI's own, alpha folded in"),
    Format("F7", "native", "peft", True, "ComfyUI's own with alpha beside"),
    Format("F8", "native", "kohya", True, "ComfyUI's names with kohya's endings"),
    Format("F9", "bare", "peft", False, "diffusers' names without a prefix"),
)
KNOWN = {"sd15": _UNET, "sdxl": _UNET, "flux1": _FLUX, "flux2": _FLUX}
WRITTEN = schema.FAMILY_FORMATS


def find(family: str, name: str) -> Format:
    """The format that is written under a name, "auto" being the family's usual. Raises UserError for another."""
    allowed = WRITTEN[family]
    chosen = allowed[0] if name == "auto" else name
    if chosen not in allowed:
        raise UserError(f"{name} is no format for {FAMILIES[family]} files: choose one of {', '.join(allowed)}")
    return next(form for form in KNOWN[family] if form.name == chosen)


def split(tensor: str) -> tuple[str, str, str] | None:
    """(key, part, kind of ending) of a tensor's name; part: "down", "up", "alpha", "dora", "vector" or "mid"."""
    for ending, (kind, part) in _ENDINGS.items():
        if tensor.endswith(ending):
            return tensor.removesuffix(ending), part, kind
    return None


def styles(family: str) -> dict[str, Naming]:
    """Every naming that is known of a family."""
    return {form.style: names.naming(family, form.style) for form in KNOWN[family]}


def known_keys(keys: Iterable[str], family: str) -> dict[str, int]:
    """How many of these keys each naming of a family knows."""
    keys = list(keys)
    return {style: sum(naming.at(key) is not None for key in keys) for style, naming in styles(family).items()}


def recognise(tensors: Mapping[str, object], family: str, style: str) -> Format:
    """The format of a file whose naming is known, by its endings."""
    found = [parts for name in tensors if (parts := split(name))]
    ending = "peft" if any(kind == "peft" for _, _, kind in found) else "kohya"
    alpha = any(part == "alpha" for _, part, _ in found)
    fitting = [form for form in KNOWN[family] if form.style == style]
    return min(fitting, key=lambda form: (form.ending != ending, form.alpha != alpha))
