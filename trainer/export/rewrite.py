"""Writes a safetensors file anew with some of its tensors changed, one of them in memory at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from trainer.errors import NO_ROOM, UserError
from trainer.families.tensors import Header, TensorInfo
from trainer.files import replacing

PIECE = 16 * 2**20  # bytes
HASHES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}  # of the data, and what stands before the digits

Change = Callable[[TensorInfo], Tensor | None]  # a tensor's new values in any floating type; None: as it was


def rewrite(header: Header, out: Path, change: Change, metadata: Mapping[str, str]) -> None:
    """Write the file of `header` as `out`: the same tensors, types and order; `change` is asked for each.

    Hashes of the data that the metadata hold are made anew. Raises UserError when the disk is full; nothing
    half-written stays.
    """
    ordered = sorted(header.tensors.values(), key=lambda info: info.start)
    size = sum(info.end - info.start for info in ordered)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room(out, size)
    texts = {key: text for key, text in metadata.items() if key != "sshs_legacy_hash"}
    try:
        with replacing(out) as file:
            file.write(_header(ordered, _with_hash(texts, "0" * 64)))
            digest = hashlib.sha256()
            for info in ordered:
                _write_tensor(file, digest, info, change(info))
            file.seek(0)
            file.write(_header(ordered, _with_hash(texts, digest.hexdigest())))
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _full(out, size) from error
        raise


def check_room(out: Path, size: int) -> None:
    """Raise UserError when a file of that size would not fit."""
    if shutil.disk_usage(out.parent).free < size:
        raise _full(out, size)


def _with_hash(texts: Mapping[str, str], digest: str) -> dict[str, str]:
    return {key: HASHES[key] + digest if key in HASHES else text for key, text in texts.items()}


def _header(ordered: list[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for info in ordered:
        end = place + info.end - info.start
        table[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, digest: hashlib._Hash, info: TensorInfo, tensor: Tensor | None) -> None:
    if tensor is not None:
        content = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        file.write(content)
        digest.update(content)
        return
    with info.file.open("rb") as source:
        source.seek(info.start)
        left = info.end - info.start
        while left:
            piece = source.read(min(PIECE, left))
            if not piece:
                raise UserError(f"{info.file} is cut short: download it again")
            file.write(piece)
            digest.update(piece)
            left -= len(piece)


def _full(out: Path, size: int) -> UserError:
    free = shutil.disk_usage(out.parent).free
    return UserError(f"{out} was not written: it needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free. "
                     "Make room there and try again; nothing half-written was left behind")
