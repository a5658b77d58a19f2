"""Tensors on disk: told apart by cheap hashes, memory-mapped, quantised, moved to a device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.families.header import Header as Header
from trainer.families.header import Part as Part
from trainer.families.header import TensorInfo as TensorInfo
from trainer.families.header import count_numbered as count_numbered
from trainer.families.header import read_header as read_header
from trainer.families.header import without_prefix as without_prefix
from trainer.quantize.available import check
from trainer.quantize.model import block_paths, linears_in_blocks, quantised_linear

Keep = Callable[[nn.Module], None]
_SAMPLE_BYTES = 64


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
    quantize: str = "none", keep: Keep | None = None,
) -> nn.Module:
    """Give a module on the meta device its weights, one tensor at a time, frozen and in eval mode.

    quantize: "none", or a mode (`trainer.quantize`) that the linears of the module's blocks are turned to, each on
    `device` as soon as it is there. keep: takes over each repeated block with its weights before the next one's are
    read. The weights are copied, so that a file replaced during a run changes nothing. Raises UserError naming
    `source` when a weight is missing or has another shape, and for a mode that the device cannot hold.
    """
    expected = module.state_dict()
    _check_shapes(expected, weights, source)
    check(quantize, torch.device(device))
    paths = block_paths(module) if keep else []
    for path in paths:
        block = module.get_submodule(path)
        _load(block, f"{path}.", block.state_dict(), weights, device, dtype, quantize)
        keep(block.to(device).requires_grad_(False))
    kept = tuple(f"{path}." for path in paths)
    _load(module, "", [name for name in expected if not name.startswith(kept)], weights, device, dtype, quantize)
    module.to(device)  # buffers that are not stored
    return module.requires_grad_(False).eval()


def _load(module: nn.Module, prefix: str, names: Iterable[str], weights: Mapping[str, Tensor],
          device: torch.device | str, dtype: torch.dtype, quantize: str) -> None:
    """Give a module the weights of these names, which begin with `prefix` in `weights`."""
    linears = {} if quantize == "none" else linears_in_blocks(module, prefix)
    state = {name: _moved(weights[prefix + name], device, dtype, _scale(weights, prefix + name))
             for name in names if name.removesuffix(".weight") not in linears}
    module.load_state_dict(state, assign=True, strict=False)
    for path, linear in linears.items():
        name = f"{prefix}{path}.weight"
        weight, scale = weights[name].to(device, copy=True), _scale(weights, name)
        module.set_submodule(path, quantised_linear(weight, scale, linear.bias, quantize, dtype))


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
