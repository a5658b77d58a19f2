"""Tensors on disk: safetensors files known by their headers, told apart by cheap hashes, moved to a device."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainer import tensor_entry
from trainer.errors import UserError
from trainer.quantize.available import check
from trainer.quantize.model import linears_in_blocks, quantised_linear

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_LARGEST_HEADER = 100 * 2**20  # safetensors' own limit
_SAMPLE_BYTES = 64


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
        return torch.Size(self.shape).numel()


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


def fingerprint(part: Part, extra: Iterable[bytes] = ()) -> str:
    """A hash (32 hex digits) that changes when the part's weights or config do, for names of caches.

    SHA-256 over the config, and of each tensor its name, dtype, shape and the 64 bytes in its middle: any training
    or merging changes some of them, and no more than a page of each tensor is read. `extra` is hashed too.
    """
    digest = hashlib.sha256(json.dumps(part.config, sort_keys=True, default=str).encode())
    for file in sorted({info.file for info in part.tensors.values()}):
        with file.open("rb") as stream:
            for name, info in sorted(part.tensors.items()):
                if info.file == file:
                    digest.update(f"{name} {info.dtype} {info.shape}".encode())
                    stream.seek(max(info.start, (info.start + info.end - _SAMPLE_BYTES) // 2))
                    digest.update(stream.read(min(_SAMPLE_BYTES, info.end - info.start)))
    for piece in extra:
        digest.update(piece)
    return digest.hexdigest()[:32]


def meta_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Tensors of the right shapes without data, so that a converter of names can be asked before loading."""
    return {name: torch.empty(info.shape, device="meta") for name, info in tensors.items()}


def mapped_tensors(part: Part) -> dict[str, Tensor]:
    """The part's tensors, memory-mapped: read from disk only as far as they are used, never all held at once."""
    files = {file: safe_open(file, framework="pt") for file in {info.file for info in part.tensors.values()}}
    return {name: files[info.file].get_tensor(info.name) for name, info in part.tensors.items()}


def fill(
    module: nn.Module, weights: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype, source: Path,
    quantize: str = "none",
) -> nn.Module:
    """Give a module on the meta device its weights, one tensor at a time, frozen and in eval mode.

    quantize: "none", or a mode (`trainer.quantize`) that the linears of the module's blocks are turned to, each on
    `device` as soon as it is there. The weights are copied, so that a file replaced during a run changes nothing.
    Raises UserError naming `source` when a weight is missing or has another shape, and for a mode that the device
    cannot hold.
    """
    expected = module.state_dict()
    _check_shapes(expected, weights, source)
    check(quantize, torch.device(device))
    linears = {} if quantize == "none" else linears_in_blocks(module)
    plain = [name for name in expected if name.removesuffix(".weight") not in linears]
    state = {name: _moved(weights[name], device, dtype, _scale(weights, name)) for name in plain}
    module.load_state_dict(state, assign=True, strict=False)
    for path, linear in linears.items():
        weight, scale = weights[f"{path}.weight"].to(device, copy=True), _scale(weights, f"{path}.weight")
        module.set_submodule(path, quantised_linear(weight, scale, linear.bias, quantize, dtype))
    module.to(device)  # buffers that are not stored
    return module.requires_grad_(False).eval()


def _check_shapes(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: Path) -> None:
    missing = [name for name in expected if name not in weights]
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} of {len(expected)} weights, such as {missing[0]}: "
            f"the file is damaged or not of this kind of model"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has the shape {tuple(weights[name].shape)} instead of "
                f"{tuple(tensor.shape)}: it is not of this kind of model"
            )


def _scale(weights: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The scale of an fp8 weight, as ComfyUI keeps it beside: `scale_weight` or `weight_scale`."""
    module = name.removesuffix("weight")
    return next((weights[key] for key in (f"{module}scale_weight", f"{name}_scale") if key in weights), None)


def _moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    if scale is not None:
        scale = scale.to(device, torch.float32)
        scale = scale if scale.ndim == 0 or scale.ndim == tensor.ndim else scale.view(-1, *[1] * (tensor.ndim - 1))
        return (tensor.to(device, torch.float32) * scale).to(dtype)
    kept = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return kept.contiguous()  # transposed in some files: products would differ in their last bits
