"""The beginning of a safetensors file: what a file is that has none, and a tensor's entry checked to its numbers."""

from __future__ import annotations

import math

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
        "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8}


def what_else(first: bytes) -> str:
    """What a file is whose first bytes are no safetensors file's, and what to take instead; "" for an unknown kind."""
    if not first:
        return "empty: download it again"
    if first.startswith(b"version "):
        return "a pointer of Git LFS: fetch the real file with `git lfs pull`"
    if first.lstrip().startswith(b"<"):
        return "a web page: download the file itself"
    if first.startswith(b"GGUF"):
        return "a GGUF, quantised for drawing: use the .safetensors of this model (bf16, fp16 or fp8)"
    if first.startswith((b"PK", b"\x80")):
        return ("a pickle under another name, which can run any program when it is opened: "
                "use the .safetensors of this model")
    return ""


def parse(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, start, end) of an entry, in bytes from the beginning of the data.

    Raises ValueError, in words that go on "the file cannot be read: …", where a number is none, or is impossible, or
    the bytes are not those of the shape.
    """
    place = f"tensor {name[:100]!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{place} lacks its type, shape or place")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in BITS if isinstance(dtype, str) else True:
        raise ValueError(f"{place} has the unknown type {str(dtype)[:20]!r}")
    if not _sizes(shape) or len(shape) > 8:
        raise ValueError(f"{place} has the impossible shape {str(shape)[:60]}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{place} has the impossible place {str(offsets)[:60]}")
    needed = math.prod(shape) * BITS[dtype] // 8
    if needed != offsets[1] - offsets[0]:
        raise ValueError(f"{place} of shape {str(shape)[:60]} has {offsets[1] - offsets[0]:,} bytes instead of "
                         f"{str(needed)[:20]}")
    return dtype, tuple(shape), *offsets


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
