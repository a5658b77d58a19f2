"""Puts LoRAs into a base model for good: the checkpoint is written anew in its own layout, tensor by tensor."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.export import texts
from trainer.export.base_model import COMPONENTS, DTYPES, BaseModel, open_base, read_tensor
from trainer.export.formats import FAMILIES
from trainer.export.layers import check_out, pairs_of, source
from trainer.export.lora_file import swap_halves
from trainer.export.merge import Weighted, open_weighted
from trainer.export.reading import misfits
from trainer.export.resize import Tell
from trainer.export.rewrite import check_room, rewrite
from trainer.export.stacked import Pair
from trainer.families.tensors import Header, TensorInfo
from trainer.files import sync_folder

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


@dataclass(frozen=True)
class Baked:
    """The checkpoint written; `left_out` are modules of text encoders that the base does not hold."""

    path: Path
    bytes: int
    changed: int  # tensors
    left_out: list[str]


def bake(base: Path, paths: Sequence[Path], weights: Sequence[float], out: Path, *,
         tell: Tell = lambda done, of: None) -> Baked:
    """Write `base` (a single file or a diffusers folder) as `out` with the weighted LoRAs in it.

    W + weight ΔW in fp32, cast to the tensor's own type last; one tensor is in memory at a time. DoRA (of the input
    axis) is W + weight (m (W + ΔW) / ‖W + ΔW‖ - W), applied in the order of the files. Raises UserError for LoRAs that
    do not fit the base, for DoRA of the output axis, and when `out` is there as a folder or an input.
    """
    files = open_weighted(paths, weights)
    model = open_base(base)
    check_out(out, base, *paths)
    left_out = [module for file in files for module in _fit(model, file)]
    work = _Work(files, model, tell)
    if base.is_dir():
        size = _write_folder(model, out, work)
    else:
        rewrite(model.headers[0], out, work.change, _texts(model.headers[0], files))
        size = out.stat().st_size
    return Baked(out, size, work.changed, sorted(set(left_out)))


def _fit(model: BaseModel, file: Weighted) -> list[str]:
    """Modules of the file whose component the base has not. Raises UserError when another has no fitting place."""
    lora = file.lora
    if lora.family != model.family:
        raise UserError(f"{lora.path} is for {FAMILIES[lora.family]} and {model.path} is {FAMILIES[model.family]}: "
                        "give its own base")
    absent = []
    for misfit in misfits(lora, model.sizes):
        modules = lora.entries[misfit.key].place.modules
        if misfit.expected is None and modules[0].startswith("text_encoder") and (
                modules[0].partition(".")[0] not in model.components):
            absent += modules
            continue
        shape = " x ".join(map(str, misfit.found))
        wanted = "is not there" if misfit.expected is None else f"has {' x '.join(map(str, misfit.expected))}"
        raise UserError(f"{lora.path} does not fit {model.path}: {misfit.key} is {shape}, which {wanted} in the base. "
                        "Give the base that it was trained on")
    for entry in lora.entries.values():
        if "dora" in entry.parts and entry.parts["dora"].shape[0] != 1:
            raise UserError(f"{lora.path}: the DoRA magnitudes of {entry.key} are of the output axis, which programs "
                            "read in different ways, so there is no one right result")
    return absent


class _Work:
    """Changes tensors when asked, and counts them."""

    def __init__(self, files: Sequence[Weighted], model: BaseModel, tell: Tell) -> None:
        self.files, self.tell, self.changed = files, tell, 0
        self._slots = {(slot.info.file, slot.info.name): slot for slot in model.slots}
        self._keys = [{module: key for key, entry in file.lora.entries.items() for module in entry.place.modules}
                      for file in files]
        self._done = 0

    def change(self, info: TensorInfo) -> Tensor | None:
        """A tensor with the LoRAs in it, in its own type; None where they change nothing."""
        slot = self._slots.get((info.file, info.name))
        if slot is None:
            return None
        self._done += 1
        self.tell(self._done, len(self._slots))
        keys = [list(dict.fromkeys(own[module] for module in slot.place.modules if module in own))
                for own in self._keys]
        if not any(keys):
            return None
        self.changed += 1
        weight = read_tensor(info).float()
        weight = swap_halves(weight) if slot.place.swapped else weight
        changes = [{pair[0]: pair for pair in pairs_of(file.lora, own)} for file, own in zip(self.files, keys)]
        for module, piece in zip(slot.place.modules, weight.split(slot.heights)):
            for file, change in zip(self.files, changes):
                if module in change:
                    _apply(piece, change[module], file.weight)
        weight = (swap_halves(weight) if slot.place.swapped else weight).to(DTYPES[info.dtype])
        if not weight.isfinite().all():
            raise UserError(f"{info.name} of {info.file} would hold numbers that are not finite: the base is damaged, "
                            f"or the weights of the LoRAs are too large for {info.dtype}")
        return weight


def _apply(weight: Tensor, pair: Pair, strength: float) -> None:
    """Make a weight W + strength ΔW in place, or with a magnitude m [1, n] as DoRA (arXiv:2402.09353, equation 5, by
    columns) at that strength."""
    _, up, down, magnitude = pair
    up, down, flat = up.float().flatten(1), down.float().flatten(1), weight.flatten(1)
    if magnitude is None:
        flat.addmm_(up, down, alpha=strength)
        return
    moved = torch.addmm(flat, up, down).view(weight.shape)
    norms = moved.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *(1,) * (moved.ndim - 2))
    norms.clamp_min_(torch.finfo(norms.dtype).tiny ** 0.5)  # as in training: columns of zeros stay
    weight.lerp_(moved * (magnitude.float().view(norms.shape) / norms), strength)


def _texts(header: Header, files: Sequence[Weighted]) -> texts.Texts:
    """The base's own texts, and what was put into it."""
    steps = [source(file.lora, file.weight) for file in files]
    found = texts.with_step(texts.without_paths(header.metadata), "bake", base=header.file.name, **{"from": steps})
    if any(key.startswith("modelspec.") for key in found):
        found["modelspec.merged_from"] = ", ".join([header.file.stem, *(file.lora.path.stem for file in files)])
    return found


def _write_folder(model: BaseModel, out: Path, work: _Work) -> int:
    """The diffusers folder with the changed weights, in one step; what it holds beside goes along."""
    if out.exists():
        raise UserError(f"{out} is there already: give a folder that is not, as --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room(out, sum(file.stat().st_size for file in model.path.rglob("*") if file.is_file()))
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name[:60]}.", dir=out.parent))
    try:
        written = {header.file: header for header in model.headers}
        for source in sorted(model.path.rglob("*")):
            relative = source.relative_to(model.path)
            if source in written:
                rewrite(written[source], draft / relative, work.change, _texts(written[source], work.files))
            elif source.is_file() and not _is_other_weight(relative):
                (draft / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, draft / relative)
        os.chmod(draft, 0o755)
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(out.parent)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def _is_other_weight(relative: Path) -> bool:
    """Another copy of weights that were changed (a variant, a pickle): it would not hold the change."""
    return len(relative.parts) == 2 and relative.parts[0] in COMPONENTS and relative.suffix in _WEIGHTS
