"""A LoRA file over a loaded base model at any strength, changed in an instant: the base's weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from trainer.adapters import layer
from trainer.adapters.layer import AdaptedLayer, base_matrix
from trainer.adapters.target import Target
from trainer.errors import UserError
from trainer.export import reader
from trainer.export.formats import FAMILIES
from trainer.export.lora_file import open_lora

TINY = 1e-6  # below it, columns that DoRA scales away stay away


@dataclass
class Change:
    """One layer's pair as matrices in fp32, and DoRA's gain, which is found when the layer is seen."""

    up: Tensor  # m r
    down: Tensor  # n r
    magnitude: Tensor | None  # n, or channels
    gain: Tensor | None = None  # magnitude / column norm of W + up down


@dataclass(frozen=True)
class Lora:
    """A file in memory: what it changes by the layers' names, and where it says it was trained."""

    path: Path
    family: str
    changes: dict[str, Change]
    metadata: dict[str, str]
    stamp: int  # when the file was changed, in nanoseconds

    @property
    def texts(self) -> list[str]:
        """Names of text encoders' layers."""
        return [name for name in self.changes if name.startswith("text_encoder")]


def read(path: Path, family: str) -> Lora:
    """A LoRA of this family. Raises `UserError` for another file, as `trainer.export.reader.read` does."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a LoRA as a .safetensors file")
    stamp = path.stat().st_mtime_ns
    file = open_lora(path)
    if file.family != family:
        raise UserError(f"{path.name} is for {FAMILIES[file.family]} and the base model is {FAMILIES[family]}: give "
                        "its own base")
    changes = {}
    for name, (up, down, magnitude) in reader.pairs(file).items():
        changes[name] = Change(up.float().flatten(1), down.float().flatten(1).T.contiguous(),
                               None if magnitude is None else magnitude.float().flatten())
    return Lora(path, family, changes, file.metadata, stamp)


class Layers:
    """The layers of one model, by the names that files have; those that a LoRA has changed are remembered."""

    def __init__(self, family: ModuleType, name: str, model: nn.Module) -> None:
        """name: of the denoiser ("unet", "transformer"), or "text_encoder" for all that encode text."""
        self.name = name
        self._model = model
        self._known: dict[str, Target] = {}
        if name == "text_encoder":
            groups = family.adapter_targets({name: model}, [name])
            self._known = {target.name: target for target in groups}
        self._changed: dict[str, Target] = {}

    def put(self, lora: Lora | None, strength: float, device: torch.device, dtype: torch.dtype) -> None:
        """Change the layers as the file says, at this strength, and no others; None: as the base model is.

        W becomes W + strength (W' - W), W' being what the file makes of it. Raises `UserError` when the file has a
        layer that this model lacks, or that has another size here.
        """
        for target in self._changed.values():
            layer.switch(target, None, None, None)
        for name, change in (lora.changes if lora and strength else {}).items():
            if self._holds(name):
                target = self._target(name, change, lora.path)
                layer.switch(target, *_factors(target, change, strength, device, dtype))

    def fit(self, lora: Lora) -> None:
        """Raise `UserError` unless every layer of the file has its place here."""
        for name, change in lora.changes.items():
            if self._holds(name):
                self._target(name, change, lora.path)

    def _holds(self, name: str) -> bool:
        return name.startswith("text_encoder") == (self.name == "text_encoder")

    def _target(self, name: str, change: Change, path: Path) -> Target:
        """The layer of a name, ready to be changed."""
        if name in self._changed:
            target = self._changed[name]
        elif self.name == "text_encoder":
            target = self._known.get(name)
        else:
            target = self._find(name)
        if target is None:
            raise UserError(f"{path.name} does not fit this base model, which has no layer {name}: give the base that "
                            "it was trained on")
        if (len(change.up), len(change.down)) != (target.rows, target.columns):
            raise UserError(f"{path.name} does not fit this base model: {name} is {len(change.up)} x "
                            f"{len(change.down)} in it, and {target.rows} x {target.columns} in the base. Give the "
                            "base that it was trained on")
        if name not in self._changed:
            if not isinstance(target.module, AdaptedLayer):
                layer.install(target, 0.0)
            self._changed[name] = target
        return target

    def _find(self, name: str) -> Target | None:
        prefix, _, path = name.partition(".")
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            return None
        fits = prefix == self.name and (hasattr(module, "in_features") or hasattr(module, "kernel_size"))
        return Target(name, module, "") if fits else None


def _factors(target: Target, change: Change, strength: float, device: torch.device,
             dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """down [n, r], up [m, r] and gain of W + strength (W' - W), with W' = (W + up down) diag(gain) for DoRA.

    That is W diag(g) + strength up down diag(gain), g = 1 + strength (gain - 1); the layer scales `down` by g too.
    """
    up, down = change.up.to(device), change.down.to(device)
    if change.magnitude is None:
        return down.to(dtype), (strength * up).to(dtype), None
    if change.gain is None:
        change.gain = _gain(target, change)
    gain = change.gain.to(device)
    mixed = 1 + strength * (gain - 1)
    mixed = torch.where(mixed.abs() < TINY, TINY, mixed)
    each = (strength * gain / mixed).repeat_interleave(len(down) // len(gain))  # a channel's kernel places are together
    return (each[:, None] * down).to(dtype), up.to(dtype), mixed


@torch.no_grad()
def _gain(target: Target, change: Change) -> Tensor:
    """magnitude / ‖W + up down‖, by input feature or channel (DoRA, arXiv:2402.09353, equation 5, by columns)."""
    weight = base_matrix(target)
    moved = torch.addmm(weight, change.up.to(weight), change.down.T.to(weight))  # m n
    squares = moved.square().sum(0).view(len(change.magnitude), -1).sum(1)
    norms = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()  # as in training: columns of zeros stay
    return change.magnitude / norms.cpu()


def left_out(lora: Lora, names: Iterable[str]) -> list[str]:
    """Layers of models that are not changed here: names are of those that are, such as "unet"."""
    kept = tuple(names)
    return [name for name in lora.changes if not name.startswith(kept)]
