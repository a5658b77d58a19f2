"""A LoRA file opened: what it is, what it changes, and its factors read one module at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import tensor_entry
from trainer.errors import UserError
from trainer.export import formats, header, names
from trainer.export.formats import Format
from trainer.export.header import MOST_RANK, Header, Info
from trainer.export.names import Naming, Place
from trainer.export.recognise import find_family, kind_in_words
from trainer.export.stacked import Module, Pair, part_heights, unfuse

_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Entry:
    """One key of a file: the modules it changes, and its tensors as the header describes them."""

    key: str
    place: Place
    parts: Mapping[str, Info]  # "down", "up", and perhaps "alpha", "dora" (kohya's) or "vector" (PEFT's magnitude)
    tensors: Mapping[str, str]  # part → name of its tensor

    @property
    def rank(self) -> int:
        return self.parts["down"].shape[0]

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of the weight that it changes: m n, or m c k k."""
        return (self.parts["up"].shape[0], *self.parts["down"].shape[1:])

    @property
    def rows(self) -> list[int]:
        """Rows of each of its modules."""
        return part_heights(self.place.modules, *self.weight[:2])


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of a family that is known here; `unknown` are tensors that the family's names do not hold."""

    path: Path
    header: Header
    family: str
    format: Format
    entries: dict[str, Entry]
    unknown: list[str]
    incomplete: dict[str, list[str]] = field(default_factory=dict)  # key without a pair of up and down → its tensors

    @property
    def naming(self) -> Naming:
        return names.naming(self.family, self.format.style)

    @property
    def metadata(self) -> dict[str, str]:
        return self.header.metadata

    @property
    def ranks(self) -> list[int]:
        """Every rank in the file, once."""
        return sorted({entry.rank for entry in self.entries.values()})

    @property
    def dtype(self) -> str:
        """Precision of the factors: "fp16", "bf16" or "fp32", the widest where there are several."""
        found = {entry.parts["down"].dtype for entry in self.entries.values()}
        widest = max(found, key=lambda name: (tensor_entry.BITS[name], name))
        return {"F16": "fp16", "BF16": "bf16"}.get(widest, "fp32")

    @cached_property
    def alphas(self) -> dict[str, float]:
        """Alpha of each key that has one."""
        with self._open() as file:
            return {key: file.get_tensor(entry.tensors["alpha"]).item()
                    for key, entry in self.entries.items() if "alpha" in entry.parts}

    def scale(self, key: str) -> float:
        """What up down is multiplied by: alpha / rank, or 1 without alpha."""
        rank = self.entries[key].rank
        return self.alphas.get(key, rank) / rank

    def modules(self, *, fold: bool = True, keys: Iterable[str] | None = None) -> Iterator[tuple[Entry, Module]]:
        """Each key's up [m, r] or [m, r, 1, 1], down [r, n] or [r, c, k, k] and magnitude or None, as stored.

        In fp32 (fp64 where it is stored so), with alpha / rank in `up`, or as it stands where `fold` is False.
        Nothing but the present module is in memory.
        """
        with self._open() as file:
            for key in self.entries if keys is None else keys:
                entry = self.entries[key]
                up, down = (_wide(file.get_tensor(entry.tensors[part])) for part in ("up", "down"))
                kind = next((part for part in ("dora", "vector") if part in entry.parts), None)
                magnitude = _wide(file.get_tensor(entry.tensors[kind])) if kind else None
                yield entry, (up * self.scale(key) if fold and self.scale(key) != 1.0 else up, down, magnitude)

    def pairs(self, *, fold: bool = True, keys: Iterable[str] | None = None) -> Iterator[Pair]:
        """(module path, up, down, magnitude) of every module, as `writer.write` takes them: fused keys come apart.

        Parts without any change are left out unless all of their key are. Raises UserError for DoRA magnitudes that
        cannot come apart, or are PEFT's.
        """
        for entry, (up, down, magnitude) in self.modules(fold=fold, keys=keys):
            if "vector" in entry.parts:
                raise UserError(f"{self.path}: {entry.key} has DoRA magnitudes of PEFT's kind, which only diffusers "
                                "reads and no other format holds")
            if entry.place.swapped:
                up = swap_halves(up)
                magnitude = swap_halves(magnitude) if magnitude is not None and len(magnitude) > 1 else magnitude
            if len(entry.place.modules) == 1:
                yield entry.place.modules[0], up, down, magnitude
                continue
            if magnitude is not None:
                raise UserError(f"{self.path}: {entry.key} has one DoRA magnitude over several layers, which cannot "
                                "come apart: keep the file as it is")
            whole = not up.any()
            for module, (piece, own) in zip(entry.place.modules, unfuse(up, down, entry.rows)):
                if whole or piece.any():
                    yield module, piece, own, None

    def _open(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path} cannot be read as a safetensors file ({error}). Download or export it "
                            "again.") from error


def open_lora(path: Path, *, family: str = "") -> LoraFile:
    """Open a LoRA by its header. family: of which it must be; "" finds out.

    Raises UserError, naming the file, for one that is missing or damaged, that is no LoRA, whose factors do not fit
    each other, that changes a layer twice, or that holds none of the family's modules.
    """
    described = header.read(path)
    grouped: dict[str, dict[str, str]] = {}
    unknown = []
    for name in described.tensors:
        found = formats.split(name)
        if found is None:
            unknown.append(name)
        elif found[1] in grouped.get(found[0], {}):
            raise _twice(path, grouped[found[0]][found[1]], name)
        else:
            grouped.setdefault(found[0], {})[found[1]] = name
    family, style = find_family(described, grouped, family)
    form, naming = formats.recognise(described.tensors, family, style), names.naming(family, style)
    entries, incomplete = {}, {}
    for key, tensors in grouped.items():
        place = naming.at(key)
        if "mid" in tensors:
            raise UserError(f"{path} {kind_in_words(tensors.values(), family)}")
        if place is None:
            unknown += tensors.values()
        elif not _paired(tensors):
            incomplete[key] = list(tensors.values())
        else:
            parts = {part: described.tensors[name] for part, name in tensors.items()}
            entries[key] = _checked(path, Entry(key, place, parts, tensors))
    if not entries and not incomplete:
        raise UserError(f"{path} {kind_in_words(described.tensors, family)}")
    owners: dict[str, str] = {}
    for key, entry in entries.items():
        for module in entry.place.modules:
            if owners.setdefault(module, key) != key:
                raise _twice(path, owners[module], key)
    return LoraFile(path, described, family, form, entries, unknown, incomplete)


def _paired(tensors: Mapping[str, str]) -> bool:
    """Whether up and down are there, and are one pair: no program puts lora_down and lora_B together."""
    return {"up", "down"} <= tensors.keys() and len({formats.split(tensors[part])[2] for part in ("up", "down")}) == 1


def _twice(path: Path, first: str, second: str) -> UserError:
    return UserError(f"{path} changes one layer twice, by {first[:100]} and by {second[:100]}, of which each program "
                     "takes another. Remove one of them, or export the file again")


def _checked(path: Path, entry: Entry) -> Entry:
    """The entry, if its factors fit each other."""
    up, down, alpha = entry.parts["up"], entry.parts["down"], entry.parts.get("alpha")
    shapes = f"up {list(up.shape)}, down {list(down.shape)}"
    if {up.dtype, down.dtype} - _FLOATS:
        raise UserError(f"{path}: the factors of {entry.key} are {up.dtype} and {down.dtype}, which no LoRA is kept in")
    flat = len(up.shape) == len(down.shape) == 2
    if not (flat or len(up.shape) == len(down.shape) == 4 and up.shape[2:] == (1, 1)) or up.shape[1] != down.shape[0]:
        raise UserError(f"{path}: the factors of {entry.key} do not fit each other: {shapes}")
    if 0 in up.shape + down.shape or entry.rank > MOST_RANK:
        raise UserError(f"{path}: the rank of {entry.key} is {entry.rank}, which no LoRA has ({shapes})")
    if alpha is not None and (torch.Size(alpha.shape).numel() != 1 or alpha.dtype not in _FLOATS):
        raise UserError(f"{path}: alpha of {entry.key} is no single number but {alpha.dtype} {list(alpha.shape)}")
    if sum(entry.rows) != entry.weight[0] or min(entry.rows) <= 0:
        raise UserError(f"{path}: {entry.key} should hold {len(entry.rows)} layers, and its rows do not: {shapes}")
    _check_magnitude(path, entry)
    return entry


def _check_magnitude(path: Path, entry: Entry) -> None:
    """A magnitude is one number for each input or each output of the layer, and stands along that axis."""
    m, n, *_ = entry.weight
    for part in {"dora", "vector"} & entry.parts.keys():
        info = entry.parts[part]
        along = info.shape[:2] in ((1, n), (m, 1)) and info.shape[2:] in ((), (1, 1))
        if info.dtype not in _FLOATS or not (along if part == "dora" else torch.Size(info.shape).numel() == m):
            raise UserError(f"{path}: the DoRA magnitudes of {entry.key} are {info.dtype} {list(info.shape)}, which do "
                            f"not fit its layer of {m} outputs and {n} inputs. Export the file again")


def swap_halves(rows: Tensor) -> Tensor:
    """The second half of the rows before the first: diffusers' (scale, shift) and the authors' (shift, scale)."""
    return torch.cat(rows.chunk(2)[::-1])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
