"""A safetensors file by its header: names, types, shapes and places of its tensors; no weights are read."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import tensor_entry
from trainer.errors import UserError

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_LARGEST_HEADER = 100 * 2**20  # safetensors' own limit


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, as the header describes it."""

    file: Path
    name: str  # in the file
    dtype: str  # safetensors' name, such as "F16"
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A safetensors file without its data."""

    file: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Part:
    """One component of a base model: its tensors, named as in their layout, and its config."""

    source: Path  # file or folder to name in messages
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    layout: str  # "diffusers" or "ldm"

    @property
    def params(self) -> int:
        return sum(info.count for info in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(info.end - info.start for info in self.tensors.values())


def read_header(file: Path) -> Header:
    """The header of a safetensors file.

    Raises UserError for a file that is missing, a pickle, cut short, or not a safetensors file, and for a tensor whose
    type, shape and bytes do not agree.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    if file.suffix.lower() in _PICKLES:
        raise UserError(
            f"{file} is a pickle, which can run any program when it is opened: use the .safetensors "
            f"of this model, or convert it in the tool that made it"
        )
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(9)
        length = struct.unpack("<Q", first[:8])[0] if len(first) == 9 else 0
        if not 2 <= length <= _LARGEST_HEADER or first[8:] != b"{":
            found = tensor_entry.what_else(first)
            raise UserError(f"{file} is not a safetensors file" + (f" but {found}" if found else
                            ". Download it again, or choose another file"))
        if 8 + length > size:
            raise _cut_short(file, size, 8 + length)
        text = first[8:] + stream.read(length - 1)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{file} is not a safetensors file: its header cannot be read") from None
    needed = max((info.end for info in tensors.values()), default=8 + length)
    if needed > size:
        raise _cut_short(file, size, needed)
    return Header(file, tensors, metadata)


def _tensor_info(file: Path, name: str, entry: object, offset: int) -> TensorInfo:
    try:
        dtype, shape, start, end = tensor_entry.parse(name, entry)
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}. Download it again") from None
    return TensorInfo(file, name, dtype, shape, offset + start, offset + end)


def _cut_short(file: Path, size: int, needed: int) -> UserError:
    return UserError(f"{file} is cut short: it has {size:,} of {needed:,} bytes. Download it again")


def without_prefix(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: info for name, info in tensors.items() if name.startswith(prefix)}


def count_numbered(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand at the group of `pattern` (a regular expression) in the names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
