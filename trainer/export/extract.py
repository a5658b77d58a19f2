"""Takes a LoRA out of the difference of two checkpoints: what a fine-tuned model changed, at a rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.export import formats, lowrank, metadata, texts, writer
from trainer.export.base_model import DTYPES, BaseModel, Slot, open_base, read_modules, read_tensor
from trainer.export.formats import FAMILIES
from trainer.export.header import MOST_RANK
from trainer.export.layers import check_out
from trainer.export.resize import Cut, Resized, Tell
from trainer.export.stacked import Pair
from trainer.families.tensors import TensorInfo


@dataclass(frozen=True)
class Extracted(Resized):
    """The LoRA written and each layer's loss; `others` are tensors that differ too and that no LoRA holds."""

    others: list[str]


def extract(base: Path, tuned: Path, out: Path, *, rank: int, energy: float = 1.0, exact: bool = False,
            to: str = "auto", dtype: str = "auto", tell: Tell = lambda done, of: None) -> Extracted:
    """Write the change from `base` to `tuned` (files or folders, in any of their layouts) as a LoRA.

    rank: each layer's largest; energy: fewer where this share (0 to 1) of a layer's ‖ΔW‖_F² needs no more. Linear
    layers and convolutions, of text encoders too where both have them. By a randomised decomposition, or exactly
    (`lowrank.of_matrix`), one layer in memory at a time. Raises UserError for models of several families or sizes,
    and when nothing differs.
    """
    if not 1 <= rank <= MOST_RANK:
        raise UserError(f"--rank {rank}: give a whole number from 1 to {MOST_RANK}")
    if not 0 < energy <= 1:
        raise UserError(f"--energy {energy:g}: give a share between 0 and 1, such as 0.98")
    check_out(out, base, tuned)
    before, after = open_base(base), open_base(tuned)
    _check_alike(before, after)
    pairs: list[Pair] = []
    cuts: list[Cut] = []
    room = _Room(before, rank)
    for module, difference, done, of in _differences(before, after):
        (name, up, down, _), cut = _pair(module, difference, rank, energy, exact)
        pairs.append((name, room.keep(up), room.keep(down), None))
        cuts.append(cut)
        tell(done, of)
    if not pairs:
        raise UserError(f"{tuned} and {base} have the same weights in every layer: there is nothing to extract")
    family = before.family
    written = writer.write(out, pairs, family=family, dtype=formats.DTYPES[family] if dtype == "auto" else dtype,
                           metadata=_texts(before, after, rank), form=formats.find(family, to).name)
    return Extracted(written, cuts, list(_others(before, after)))


class _Room:
    """One stretch of memory for all results: small pieces here and there between the large ones that come and go
    would keep the system's allocator from using theirs again."""

    def __init__(self, model: BaseModel, rank: int) -> None:
        shapes = model.sizes.values()
        self._all = torch.empty(sum(min(rank, m) * (m + math.prod(rest)) for m, *rest in shapes))
        self._used = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        begin, self._used = self._used, self._used + tensor.numel()
        return self._all[begin : self._used].view(tensor.shape).copy_(tensor)


def _check_alike(before: BaseModel, after: BaseModel) -> None:
    if before.family != after.family:
        raise UserError(f"{before.path} is {FAMILIES[before.family]} and {after.path} is {FAMILIES[after.family]}: "
                        "both must be of one family")
    sizes = after.sizes
    for module, shape in before.sizes.items():
        if module in sizes and _flat(sizes[module]) != _flat(shape):
            raise UserError(f"{module} is {' x '.join(map(str, shape))} in {before.path} and "
                            f"{' x '.join(map(str, sizes[module]))} in {after.path}: they are models of other sizes")


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _differences(before: BaseModel, after: BaseModel) -> Iterator[tuple[str, torch.Tensor, int, int]]:
    """Modules that differ: name, difference in fp32 (m n, or m c k k), tensors done, of all."""
    holders = {module: slot for slot in before.slots for module in slot.place.modules}
    held: tuple[Slot | None, dict[str, torch.Tensor]] = (None, {})  # q, k and v are one tensor in some files
    for done, slot in enumerate(after.slots, 1):
        for module, weight in read_modules(slot):
            holder = holders.get(module)
            if holder is None:
                continue
            if held[0] is not holder:
                held = holder, dict(read_modules(holder))
            difference = weight.sub_(held[1][module].view(weight.shape))  # it is our own, and large
            if difference.any():
                yield module, difference, done, len(after.slots)


def _pair(module: str, difference: torch.Tensor, rank: int, energy: float, exact: bool) -> tuple[Pair, Cut]:
    if not difference.isfinite().all():
        raise UserError(f"{module} holds numbers that are not finite in one of the models: one of the files is damaged")
    matrix = difference.flatten(1)
    total = float(matrix.double().square().sum()) if matrix.numel() < 2**22 else float(matrix.norm()) ** 2
    svd = lowrank.of_matrix(matrix, rank, exact=exact)
    kept = min(rank, len(svd.s), lowrank.rank_for(svd.s, energy, total), svd.rank)
    up, down = lowrank.as_layer(*svd.factors(kept), difference.shape[1:])
    lost = max(0.0, total - float(svd.s[:kept].square().sum()))
    return (module, up, down, None), Cut(module, min(matrix.shape), kept, total, lost)


def _others(before: BaseModel, after: BaseModel) -> Iterator[str]:
    """Tensors of the same name and shape in both that differ and that no LoRA holds, such as norms and biases."""
    known = {(slot.info.file, slot.info.name) for model in (before, after) for slot in model.slots}
    theirs = {_name(before, info): info for header in before.headers for info in header.tensors.values()}
    for header in after.headers:
        for info in header.tensors.values():
            other = theirs.get(_name(after, info))
            if (info.file, info.name) in known or other is None or other.shape != info.shape:
                continue
            if {info.dtype, other.dtype} <= DTYPES.keys() and not torch.equal(read_tensor(info).float(),
                                                                             read_tensor(other).float()):
                yield info.name


def _name(model: BaseModel, info: TensorInfo) -> str:
    folder = info.file.parent.name if model.path.is_dir() else ""
    return f"{folder}/{info.name}"


def _texts(before: BaseModel, after: BaseModel, rank: int) -> texts.Texts:
    """What programs read of a LoRA, and of what it was made."""
    about = metadata.BASES[before.family]
    title = after.path.stem
    found = {
        "ss_v2": "False", "ss_base_model_version": about.version, "ss_sd_model_name": before.path.name,
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)),
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": about.architecture,
        "modelspec.implementation": about.implementation, "modelspec.title": title,
    }
    return texts.with_step(found, "extract", base=before.path.name, tuned=after.path.name, rank=rank)
