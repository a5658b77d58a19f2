"""The way from what a preset names (folder, file or hub id) to a base model's parts, reading headers only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.families import hub
from trainer.families.folders import component, explain_no_model, is_complete, read_json
from trainer.families.ldm import VAE_PREFIX, unet_config, vae_config
from trainer.families.recognise import FAMILIES, KINDS, contents, file_kind, folder_kind
from trainer.families.tensors import Header, Part, TensorInfo, read_header, without_prefix

_WORDS = {"vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
_WAYS = {  # what to do with a file that is not the base it was given as
    **{family: f"set model.family = {family!r}, or choose another model.base" for family in FAMILIES},
    "lora": "choose another model.base; to go on training it, give it as adapter.start_from",
    "vae": "choose another model.base, and give this one as model.vae",
    "text_encoder": "choose another model.base, and give this one as model.text_encoder",
    "quantised": "use its bf16, fp16 or fp8 file; memory.quantize then makes it small",
}


def locate(base: str, components: Collection[str]) -> Path:
    """The folder or file that `base` names; a hub id's is in the cache. Raises UserError when it is not there."""
    if not hub.is_hub_id(base):
        path = Path(base).expanduser()
        if not path.exists():
            raise UserError(
                f"there is no folder or file {base}: model.base must be a diffusers folder, a "
                f".safetensors file or a hub id such as someone/some-model"
            )
        return path
    if (folder := hub.cached(base)) is None or not is_complete(folder, components):
        raise UserError(f"{base} was not downloaded yet: train with it once, or give the path of a local folder")
    return folder


def is_here(repo: str, components: Collection[str]) -> bool:
    """Whether the cache has these components of a model on the hub, whole."""
    folder = hub.cached(repo)
    return folder is not None and is_complete(folder, components)


def open_folder(folder: Path, kind: str, components: Collection[str]) -> dict[str, Part]:
    """The `components` of a diffusers folder of the given kind. Raises UserError saying what it is instead."""
    check_folder(folder, kind, str(folder))
    return {name: component(folder / name) for name in components}


def check_folder(folder: Path, kind: str, name: str) -> None:
    """Raise UserError, calling it `name`, unless a diffusers folder is of this kind; its two smallest files tell."""
    if not (folder / "model_index.json").is_file():
        raise explain_no_model(folder)
    unet = folder / "unet" / "config.json"
    found = folder_kind(read_json(folder / "model_index.json"), read_json(unet) if unet.is_file() else None)
    if found == "other" and (folder / "unet").is_dir():
        raise UserError(f"there is no file {unet}: the model folder is not complete")
    _check_kind(name, found, kind)


def open_file(file: Path, kind: str) -> Header:
    """The header of a single file of the given kind. Raises UserError saying what it is instead."""
    header = read_header(file)
    _check_kind(str(file), file_kind(header.tensors), kind)
    return header


def _check_kind(name: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise UserError(f"{name} is {KINDS[found]}, and model.family = {wanted!r} needs {KINDS[wanted]}: "
                        + _WAYS.get(found, "choose another model.base"))


def unet_part(file: Path, tensors: Mapping[str, TensorInfo], template: Mapping[str, Any]) -> Part:
    """The UNet that these tensors are (names without prefix), its config completed from their shapes."""
    layout = "diffusers" if "conv_in.weight" in tensors else "ldm"
    try:
        return Part(file, unet_config(tensors, layout, template), dict(tensors), layout)
    except (KeyError, AttributeError, ValueError, StopIteration):
        raise UserError(f"{file} has no complete UNet: the file is damaged. Download it again") from None


def vae_from_file(file: Path, template: Mapping[str, Any]) -> Part:
    """A VAE kept as one file, in LDM or diffusers names. Raises UserError when the file has none."""
    tensors = read_header(file).tensors
    names = without_prefix(tensors, VAE_PREFIX) or tensors
    if "decoder.conv_in.weight" not in names:
        raise UserError(f"{file} has no VAE: it is {contents(tensors)}. Choose another model.vae")
    return vae_part(file, names, template)


def vae_part(file: Path, tensors: Mapping[str, TensorInfo], template: Mapping[str, Any]) -> Part:
    """The VAE that these tensors are (names without prefix), its config completed from their shapes."""
    layout = "diffusers" if any("down_blocks." in name for name in tensors) else "ldm"
    names = {
        name: info
        for name, info in tensors.items()
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn."))
    }
    try:
        return Part(file, vae_config(names, layout, template), names, layout)
    except (KeyError, IndexError, AttributeError, ValueError):
        raise UserError(f"{file} has no VAE of this kind: choose another model.vae") from None


@dataclass(frozen=True)
class Opened:
    """What `model.base` names: its parts, and what only a folder (scheduler) or only a file (header) has."""

    base: str
    path: Path
    parts: dict[str, Part]
    header: Header | None
    scheduler: dict[str, Any] | None

    def tokenizer(self, chosen: str, subfolder: str) -> Path | None:
        """The chosen tokenizer, a folder or a hub id, else the base's own, else None."""
        if chosen and hub.is_hub_id(chosen):
            if (found := hub.cached_tokenizer(chosen)) is None:
                raise UserError(f"{chosen} was not downloaded yet: train with it once, or give a tokenizer's folder")
            return found
        own = self.path / subfolder
        return Path(chosen) if chosen else own if self.path.is_dir() and own.is_dir() else None

    @property
    def name(self) -> str:
        if hub.is_hub_id(self.base):
            return self.base
        return self.path.resolve().stem if self.path.is_file() else self.path.resolve().name


def given(chosen: Mapping[str, tuple[str, Callable[[Path], Part]]]) -> dict[str, Callable[[], Part]]:
    """What `open_parts` takes as parts apart from the base: of part -> (path, what opens it), those with a path."""
    return {name: partial(find, Path(path)) for name, (path, find) in chosen.items() if path}


def open_parts(base: str, kind: str, wanted: Mapping[str, str], parts_of_file: Callable[[Header], dict[str, Part]],
               others: Mapping[str, Callable[[], Part]]) -> Opened:
    """Find a base's parts in a folder, a single file or on the hub; `others` are parts given apart from it.

    `wanted` has all parts of this kind of model, and what to give where a file lacks one, in words. Raises UserError
    that names what is missing.
    """
    components = list(wanted)
    path = locate(base, [name for name in components if name not in others])
    header, scheduler = None, None
    if path.is_dir():
        parts = open_folder(path, kind, [name for name in components if name not in others])
        scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    else:
        header = open_file(path, kind)
        parts = parts_of_file(header)
    parts |= {name: find() for name, find in others.items()}
    if missing := [name for name in components if name not in parts]:
        lacks = ", no ".join(_WORDS[name] for name in missing)
        ways = ", ".join(f"{wanted[name]} as model.{name}" for name in missing)
        raise UserError(f"{path} has no {lacks}: give {ways}")
    return Opened(base, path, parts, header, scheduler)
