"""Writes an adapter as the LoRA file that ComfyUI, A1111, Forge and diffusers read with the same strength."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.errors import NO_ROOM, UserError
from trainer.export import formats, names
from trainer.export.formats import Format
from trainer.export.lora_file import swap_halves
from trainer.export.stacked import Pair, apart, fuse
from trainer.files import sync_folder

Parts = tuple[Tensor, Tensor, Tensor | None]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
FLUX1_MLP = 4  # rows of Flux.1's proj_mlp over its inputs, where an untrained one must be filled in
LEGACY = range(0x100000, 0x110000)  # bytes of a file


@dataclass(frozen=True)
class Written:
    """What a file holds: size, number of tensors, rank, hash of its weights, modules it has no name for."""

    path: Path
    format: str
    bytes: int
    tensors: int
    rank: int
    model_hash: str
    unmatched: list[str]


def write(path: Path, pairs: Iterable[Pair], *, family: str, dtype: str, metadata: Mapping[str, str],
          form: str = "auto", alpha: float | None = None, even: bool = True) -> Written:
    """Write `pairs` as `path`, whole or not at all.

    Linear: up [m, r], down [r, n], magnitude [1, n] or None; convolution: up [m, r, 1, 1], down [r, c, k, k],
    magnitude [1, c, 1, 1]. ΔW = up down, at scale 1. dtype: "fp16", "bf16", "fp32", or "auto" for the family's
    usual. form: a name in `formats.WRITTEN`, or "auto". alpha: what to write beside, where the format keeps it and
    `up` is meant to be multiplied by alpha / rank; left out, it is the rank. Every module gets the same rank (the
    largest, by zeros) and the same alpha, because diffusers takes one of each for the whole file; `even` false leaves
    each its own rank, which older versions of diffusers misread. `ss_output_name`, the hashes and the true rank are
    put into the metadata. Raises `UserError` for weights that are not finite, for nothing to write, for DoRA in a
    format that cannot hold it, and for a full disk.
    """
    chosen = formats.find(family, form)
    modules, unmatched = _collect(pairs, family, chosen, path, even)
    if chosen.ending == "kohya":
        _complete_clip(modules)
    keyed = _keyed(modules, family, chosen, path)
    rank = max(down.shape[0] for _, down, _ in keyed.values())
    precision = DTYPES[formats.DTYPES[family] if dtype == "auto" else dtype]
    tensors: dict[str, Tensor] = {}
    for key, (up, down, magnitude) in keyed.items():
        # F5: diffusers takes fused rows apart to their parts' rank, so that they are alike only before padding
        own = down.shape[0] if chosen.name == "F5" or not even else rank
        up, down, magnitude = _cast(_pad(up, 1, own), _pad(down, 0, own), magnitude, precision)
        tensors[key + chosen.up], tensors[key + chosen.down] = up, down
        if chosen.alpha:
            tensors[key + ".alpha"] = torch.tensor(float(own) if alpha is None else alpha)
        if magnitude is not None:
            tensors[key + ".dora_scale"] = magnitude
    texts = {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank) if alpha is None else alpha)}
    size, digest = save(path, tensors, {**metadata, **{key: texts[key] for key in texts if key in metadata}})
    return Written(path, chosen.name, size, len(tensors), rank, digest, unmatched)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write a safetensors file by way of a temporary one; returns (bytes, sha256 of the tensor data).

    Written here and not by `safetensors.save_file`, which shuffles the metadata: the same weights and
    metadata give the same bytes, the hash can stand in the header, and no second copy of the tensors is made.
    Adds `ss_output_name`, `sshs_model_hash`, `sshs_legacy_hash` and `modelspec.hash_sha256`. Raises `UserError` when
    the disk is full.
    """
    # The order of safetensors itself, wide types first: every tensor stays aligned, and the hash is
    # everybody's.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    size = sum(t.numel() * t.element_size() for _, t in ordered)
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < size:
        raise _full(path, size)
    digest = hashlib.sha256()
    for _, tensor in ordered:
        digest.update(_bytes(tensor))
    texts = {**metadata, "ss_output_name": path.stem}
    header = _header(ordered, texts | {"sshs_model_hash": digest.hexdigest(),
                                       "sshs_legacy_hash": _legacy_hash(ordered, texts),
                                       "modelspec.hash_sha256": f"0x{digest.hexdigest()}"})
    temporary = path.with_name(f".{path.name[:60]}.{os.getpid()}.partial")  # another process may write the same name
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            for _, tensor in ordered:
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _full(path, size) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return len(header) + size, digest.hexdigest()


def _collect(pairs: Iterable[Pair], family: str, form: Format, path: Path,
             even: bool) -> tuple[dict[str, Parts], list[str]]:
    """Modules by their path, in fp32 on the CPU, at one rank if they shall be even; beside them the names that the
    family's map lacks."""
    naming = names.naming(family, form.style)
    modules: dict[str, Parts] = {}
    unmatched: list[str] = []
    for name, *factors in apart(pairs):
        if naming.of(name) is None:
            unmatched.append(name)
            continue
        up, down, magnitude = (None if t is None else t.detach().to("cpu", torch.float32) for t in factors)
        if not all(t.isfinite().all() for t in (up, down, magnitude) if t is not None):
            raise UserError(f"{path.name} was not written: the weights of {name} are not finite numbers. The "
                            "training has diverged: export an earlier checkpoint, and train with a smaller "
                            "learning rate.")
        modules[names.canonical(name)] = up, down, magnitude
    if not modules:
        raise UserError(f"{path.name} was not written: the adapter has no module that a {family} file can "
                        "name. Choose other adapter.targets.")
    if not even:
        return modules, unmatched
    rank = max(down.shape[0] for _, down, _ in modules.values())
    return {name: (_pad(up, 1, rank), _pad(down, 0, rank), magnitude)
            for name, (up, down, magnitude) in modules.items()}, unmatched


def _keyed(modules: Mapping[str, Parts], family: str, form: Format, path: Path) -> dict[str, Parts]:
    """By the file's keys: modules that it keeps as one matrix are fused, and halves swapped."""
    naming = names.naming(family, form.style)
    keyed: dict[str, Parts] = {}
    for name in modules:
        place = naming.of(name)
        if place.key in keyed:
            continue
        parts = [modules.get(module) for module in place.modules]
        up, down, magnitude = modules[name]
        if len(parts) > 1:
            if any(part is not None and part[2] is not None for part in parts):
                raise UserError(f"{path.name} was not written: {form.name} keeps {', '.join(place.modules)} as one "
                                "matrix, for which there is no DoRA magnitude. Choose F1.")
            width = down.shape[1]
            rows = [width if part is None else len(part[0]) for part in parts]
            if len(parts) == 4 and parts[3] is None:
                rows[3] = FLUX1_MLP * width
            up, down, _ = fuse(parts, rows, even=True)
        if place.swapped:
            up = swap_halves(up)
            magnitude = swap_halves(magnitude) if magnitude is not None and len(magnitude) > 1 else magnitude
        keyed[place.key] = up, down, magnitude
    return keyed


def _cast(up: Tensor, down: Tensor, magnitude: Tensor | None, dtype: torch.dtype) -> Parts:
    if dtype == torch.float16 and not all(torch.equal(t.half().float(), t) for t in (up, down)):
        up, down = _balance(up, down)
    # magnitudes stay fp32: they replace the norms of the whole weight, so that half precision would round W itself
    return up.to(dtype).contiguous(), down.to(dtype).contiguous(), None if magnitude is None else magnitude.contiguous()


def _balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Shift a power of two from one factor to the other where fp16 would lose small entries of a young
    adapter.

    fp16 has full precision from 2^-14 on; a largest entry below 2^-7 leaves too little room under it. ΔW
    stays exact.
    """
    high, low = float(up.abs().amax()), float(down.abs().amax())
    if not (0.0 < high < math.inf and 0.0 < low < math.inf):
        return up, down
    if min(high, low) >= 2.0**-7 and max(high, low) < 2.0**15:
        return up, down
    shift = round((math.log2(low) - math.log2(high)) / 2)
    return torch.ldexp(up, torch.tensor(shift)), torch.ldexp(down, torch.tensor(-shift))


def _complete_clip(modules: dict[str, Parts]) -> None:
    """Give every CLIP layer all four attention projections, zeros where untrained.

    Without `out_proj` diffusers drops a layer's q, k and v; A1111 applies OpenCLIP attention only when it has
    all four.
    """
    for name in list(modules):
        layer, found, _ = name.rpartition(".self_attn.")
        if found:
            up, down, _ = modules[name]  # CLIP's projections are square and alike
            for part in names.CLIP_ATTENTION:
                modules.setdefault(f"{layer}.self_attn.{part}", (torch.zeros_like(up), torch.zeros_like(down), None))


def _pad(factor: Tensor, dim: int, rank: int) -> Tensor:
    """Zeros up to `rank` along `dim`: ΔW stays the same."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    after = factor.dim() - 1 - dim
    return F.pad(factor, (0, 0) * after + (0, missing))


def _header(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape),
                       "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _legacy_hash(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """sd-scripts' older hash: 64 KiB at 1 MiB of the file that holds no metadata but `ss_*`; 8 hex digits."""
    header = _header(ordered, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    digest, place = hashlib.sha256(header[LEGACY.start : LEGACY.stop]), len(header)
    for _, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        if place < LEGACY.stop and place + size > LEGACY.start:
            digest.update(_bytes(tensor)[max(0, LEGACY.start - place) : LEGACY.stop - place])
        place += size
    return digest.hexdigest()[:8]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _full(path: Path, size: int) -> UserError:
    free = shutil.disk_usage(path.parent).free
    return UserError(f"{path} was not written: it needs {size / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB "
                     "free. Make room there and save again; nothing half-written was left behind.")
