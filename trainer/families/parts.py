"""Parts given apart from their base, as a folder or a file: opened, and told by name when they are the wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.families.folders import component
from trainer.families.opening import vae_from_file
from trainer.families.recognise import contents, encoder_name, text_kind
from trainer.families.tensors import Part, TensorInfo, read_header

_LATENTS = {4: "SD 1.5 or SDXL", 16: "Flux.1", 32: "Flux.2"}  # channels, and whose VAE has as many


def text_part(path: Path, name: str, kinds: Collection[str], words: str,
              find: Callable[[Mapping[str, TensorInfo]], Part | None]) -> Part:
    """The text encoder at `path`, given as model.<name>: of one of these kinds (see `text_kind`), in `words`.

    `find` looks for it among a file's tensors. Raises UserError saying what is there instead.
    """
    if path.is_dir():
        folder = component(path / name if (path / name).is_dir() else path)
        part, tensors = folder if text_kind(folder.tensors) in kinds else None, folder.tensors
    else:
        tensors = read_header(path).tensors
        part = find(tensors)
    if part is None:
        raise UserError(f"{path} has no {words} text encoder: it is {contents(tensors)}. Choose another model.{name}")
    return part


def vae(path: Path, template: Mapping[str, Any]) -> Part:
    """The VAE at `path`, given as model.vae. Raises UserError saying what is there instead."""
    if not path.is_dir():
        return vae_from_file(path, template)
    part = component(path / "vae" if (path / "vae").is_dir() else path)
    if not any(name.startswith("decoder.") for name in part.tensors):
        raise UserError(f"{path} has no VAE: it is {contents(part.tensors)}. Choose another model.vae")
    scale, own = part.config.get("scaling_factor"), template.get("scaling_factor")
    if scale is not None and own is not None and scale != own:  # SD 1.5's and SDXL's have the same shapes
        raise UserError(f"the VAE of {path} scales its latents by {scale:g}, and this family's by {own:g}: it is for "
                        "another kind of model. Choose another model.vae")
    return part


def check_vae(part: Part, channels: int) -> None:
    """Raise UserError unless a VAE's latents have as many channels."""
    found = part.config.get("latent_channels")
    if found != channels:
        whose = f", as {_LATENTS[found]} has" if found in _LATENTS else ""
        raise UserError(f"the VAE of {part.source} has {found} latent channels{whose}, instead of {channels}: it is "
                        "for another kind of model. Choose another model.vae")


def check_text(part: Part, name: str, found: tuple[str, int], needed: tuple[str, int], whom: str) -> None:
    """Raise UserError unless the text encoder `part`, model.<name>, is the kind and as wide as `whom` needs."""
    if found != needed:
        raise UserError(f"the text encoder of {part.source} is {encoder_name(*found)}, and {whom} needs "
                        f"{encoder_name(*needed)}: choose another model.{name}")
