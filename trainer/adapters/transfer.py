"""Exact ways out of and into a bank: export of pairs, import of a LoRA, and a layer's change of weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.adapters.target import Target
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.adapters.bank import Adapter

Pair = tuple[str, Tensor, Tensor, Tensor | None]


@torch.no_grad()
def export(adapter: Adapter, weights: str) -> Iterator[Pair]:
    """Exact pairs of every layer; a pruned adapter comes at the highest rank that a layer has kept, padded by zeros.

    In fp32 (fp64 for an fp64 bank); convolutions as up [m, r', 1, 1], down [r', c, k, k], magnitude [1, c, 1, 1].
    """
    stacks = adapter.pair_stacks(weights)
    values, columns = adapter.values(weights), _kept_columns(adapter)
    for number, target in enumerate(adapter.layout.targets):
        up = adapter.layout.slot(stacks, "up", number)
        down = adapter.layout.slot(stacks, "down", number).t()
        if columns is not None:
            up, down = up[:, columns[number]], down[columns[number]]
        magnitude = None
        if adapter.magnitude is not None:
            key = f"magnitude.{target.inputs}"
            magnitude = values[key][adapter.layout.members(key).index(number)].unsqueeze(0).clone()
        if target.convolution:
            up = up[:, :, None, None]
            down = down.reshape(-1, target.inputs, *target.module.kernel_size)
            magnitude = None if magnitude is None else magnitude[:, :, None, None]
        contiguous = torch.contiguous_format
        yield (target.name, up.clone(memory_format=contiguous), down.clone(memory_format=contiguous), magnitude)


def _kept_columns(adapter: Adapter) -> Tensor | None:
    """For a pruned adapter: which columns of each layer to write, the kept ones first, equally many for all."""
    if adapter.pruned is None or not adapter.pruned.any():
        return None
    pruned = adapter.pruned[adapter.layout.order("up", adapter.pruned.device)]
    columns = pruned.int().argsort(dim=1, stable=True)[:, : int((~pruned).sum(1).max())]
    if adapter.frozen is not None:
        fixed = torch.arange(adapter.layout.rank, 2 * adapter.layout.rank, device=columns.device)
        columns = torch.cat([columns, fixed.expand(len(columns), -1)], dim=1)
    return columns


@torch.no_grad()
def delta(adapter: Adapter, name: str, weights: str) -> Tensor:
    stacks = adapter.pair_stacks(weights)
    number = [target.name for target in adapter.layout.targets].index(name)
    up, down = (adapter.layout.slot(stacks, kind, number).double() for kind in ("up", "down"))
    return up @ down.t()


@torch.no_grad()
def load(adapter: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Each layer's change becomes up @ down of its pair, and zero where there is none; the start pair is dropped.

    alpha must already be folded into `up`. A lower rank is filled up, a higher one cut to the leading singular
    values. Raises UserError for names or shapes that do not fit.
    """
    check_pairs(adapter.layout.targets, adapter.magnitude is not None, pairs)
    adapter.frozen = None
    magnitudes: dict[int, Tensor] = {}
    device = adapter.parameters()[0].device
    for number, target in enumerate(adapter.layout.targets):
        nothing = torch.zeros(target.rows, 0), torch.zeros(0, target.columns), None
        up, down, magnitude = pairs.get(target.name, nothing)
        up, down = _at_rank(up.flatten(1).double(), down.flatten(1).double(), adapter.layout.rank)
        adapter.method.assign(adapter.leaves, number, up.to(device), down.to(device))
        if magnitude is not None:
            magnitudes[number] = magnitude.flatten()
    adapter.reset_after_import(magnitudes)


def check_pairs(targets: Sequence[Target], dora: bool,
                pairs: Mapping[str, tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Raise UserError unless every pair has its layer, of its sizes, and a place for its magnitude."""
    known = {target.name: target for target in targets}
    unknown = sorted(set(pairs) - set(known))
    if unknown:
        raise UserError(f"the LoRA has layers that this run does not train, such as {unknown[0]} "
                        f"({len(unknown)} in all): add them to adapter.targets")
    for name, (up, down, magnitude) in pairs.items():
        target, sizes = known[name], (up.flatten(1).shape, down.flatten(1).shape)
        (rows, rank), (other, columns) = sizes
        if (rows, columns) != (target.rows, target.columns) or rank != other:
            raise UserError(f"the LoRA does not fit {name}: its pair is {tuple(sizes[0])} and {tuple(sizes[1])}, "
                            f"the layer is {target.rows} x {target.columns}; it may be for another model")
        if magnitude is None:
            continue
        if not dora:
            raise UserError(f"the LoRA has DoRA magnitudes ({name}): set adapter.dora = true to continue it")
        if magnitude.numel() != target.inputs:
            raise UserError(f"the LoRA's DoRA magnitudes of {name} are {magnitude.numel()}, and the layer has "
                            f"{target.inputs} inputs: they are of the output axis, which is not read here")


def _at_rank(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair at another rank, in fp64: its best approximation from r x r work, or padded without a change.

    Only `up` is padded by zeros: with both factors at zero the new rank would get no gradient.
    """
    if up.shape[1] <= rank:
        rows = torch.empty(rank - up.shape[1], down.shape[1], dtype=down.dtype)
        rows.uniform_(-1, 1, generator=torch.Generator().manual_seed(rank)).div_(rows.shape[1] ** 0.5)
        return torch.cat([up, up.new_zeros(len(up), len(rows))], 1), torch.cat([down, rows.to(down.device)])
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.t())
    left, values, right = torch.linalg.svd(r_up @ r_down.t())
    return q_up @ (left[:, :rank] * values[:rank]), right[:rank] @ q_down.t()
