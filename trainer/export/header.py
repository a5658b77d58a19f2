"""The header of a LoRA file, checked to the last number before anything trusts it: shapes, offsets, sizes."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import tensor_entry
from trainer.errors import UserError

LARGEST = 32 * 2**20  # bytes; a LoRA's header takes a hundredth of that, pictures in the metadata the rest
MOST_VALUES = 500_000  # objects, lists and named values in it: what keeps the memory for reading it bounded
MOST_RANK = 4096  # no LoRA has more; r x r work on an absurd one would fill the memory


@dataclass(frozen=True)
class Info:
    """One tensor, as the header describes it."""

    dtype: str  # safetensors' name, such as "F16"
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the data
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; `begin` is where its data begin."""

    path: Path
    tensors: dict[str, Info]
    metadata: dict[str, str]
    begin: int


def read(path: Path) -> Header:
    """The header of a safetensors file, none of its data.

    Raises UserError for a file that is missing, a pickle, cut short, or whose header does not agree with itself:
    unknown types, shapes that are not their bytes, negative, overlapping or missing bytes, names twice.
    """
    text, size = _text(path)
    try:
        entries = json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs), parse_constant=_no_number)
        if b"\\u" in text:
            json.dumps(entries, ensure_ascii=False).encode()  # a ValueError for half a letter, which nothing can write
    except (ValueError, RecursionError):
        raise _broken(path, "its header is no JSON") from None
    if not isinstance(entries, dict):
        raise _broken(path, "its header is no table")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata are not texts")
    tensors = {name: _info(path, name, entry) for name, entry in entries.items()}
    _check_layout(path, tensors, size - 8 - len(text))
    return Header(path, tensors, metadata, 8 + len(text))


def _text(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and the size of the file."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            first = stream.read(9)
            length = struct.unpack("<Q", first[:8])[0] if len(first) == 9 else 0
            if length < 2 or first[8:] != b"{":
                found = tensor_entry.what_else(first)
                raise _broken(path, f"it is {found}" if found else "it does not begin as one")
            if length > size - 8:
                raise _broken(path, f"its header should take {length:,} bytes and the file has {size:,}: it is cut "
                              "short, or no safetensors file")
            if length > LARGEST:
                raise _broken(path, f"its header takes {length:,} bytes, more than any LoRA's ({LARGEST:,})")
            text = first[8:] + stream.read(length - 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if sum(text.count(sign) for sign in (b"{", b"[", b":")) > MOST_VALUES:
        raise _broken(path, "its header has more entries than any LoRA's")
    return text, size


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _broken(path, f"its header names {name[:100]!r} twice")
        found[name] = value
    return found


def _no_number(text: str) -> None:
    raise ValueError(text)


def _info(path: Path, name: str, entry: object) -> Info:
    try:
        return Info(*tensor_entry.parse(name, entry))
    except ValueError as error:
        raise _broken(path, str(error)) from None


def _check_layout(path: Path, tensors: dict[str, Info], size: int) -> None:
    """The tensors must lie one behind the other and fill the file."""
    place = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.end > size:
            raise _broken(path, f"it is cut short: tensor {name[:100]!r} ends at byte {info.end:,} of the data and "
                          f"there are {size:,}")
        if info.start != place:
            raise _broken(path, f"tensor {name[:100]!r} begins at byte {info.start:,} of the data instead of {place:,}")
        place = info.end
    if place != size:
        raise _broken(path, f"it has {size - place:,} bytes behind its last tensor")


def _broken(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be read as a safetensors file: {reason}. Download or export it again.")
