"""How much of its rank an adapter uses: singular values of the change of weight, from r x r matrices only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.adapters.bank import Adapter
from trainer.adapters.block_names import by_block
from trainer.manifold import exact_arithmetic, gram

TOLD = 16  # singular values of a block that are told


@dataclass(frozen=True)
class Sample:
    """What a spectrum is computed from, on the host: r x r numbers of every layer."""

    groups: dict[str, list[int]]  # layers by name of their group
    blocks: dict[str, list[int]]  # and of their block, in the model's order
    up: Tensor | None  # up^T up, layers r r; None where up is orthonormal
    down: Tensor  # down down^T, layers r r, or the singular values themselves, layers r
    drift: Tensor  # layers
    orth_error: float | None


def measure(adapter: Adapter) -> dict[str, Any]:
    """Means over each group's layers, by group name; waits for the device.

    erank: exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007), 0 for a zero change. stable:
    |delta|_F^2 / sigma_1^2. norm: |delta|_F. drift: how far the subspaces of up and down have turned since the start,
    0 to 1 (1 - |Q0^T Q|_F^2 / r for orthonormal bases). orth_error: max |X^T X - I| of all factors on the manifold, or
    None for a method without.

    By block, in the model's order: blocks: [erank, stable, norm], means over its layers. spectrum: its first 16
    singular values, falling, means over its layers, as parts of the largest.
    """
    return summarize(take(adapter))


@torch.no_grad()
def take(adapter: Adapter) -> Sample:
    """The part of `measure` that reads the adapter: one pass over the factors and one over their start."""
    factors = {key: adapter.leaves[key] for key in adapter.start}
    on_manifold = adapter.on_manifold()
    with exact_arithmetic(adapter.skip.device):
        grams = {key: gram(factor.double(), factor.double()) for key, factor in factors.items()}  # L r r
        drifts = {key: _drift(adapter.start[key], factor, None if key in on_manifold else grams[key])
                  for key, factor in factors.items()}
        up, down = _products(adapter, grams)
    errors = [_identity_error(grams[key]) for key in on_manifold]
    by_kind = adapter.method.factors(drifts)
    drift = torch.stack([_in_layer_order(adapter, by_kind, kind) for kind in ("up", "down")]).nanmean(0).nan_to_num(0.0)
    groups: dict[str, list[int]] = {}
    for number, target in enumerate(adapter.layout.targets):
        groups.setdefault(target.group, []).append(number)
    return Sample(groups, by_block(adapter.layout.targets), None if up is None else up.cpu(), down.cpu(), drift.cpu(),
                  float(torch.stack(errors).amax()) if errors else None)


def summarize(sample: Sample) -> dict[str, Any]:
    """The part of `measure` that computes spectra; needs nothing but the sample, so another thread may do it."""
    values = sample.down
    if values.ndim == 3:
        values = singular_values(sample.up, values)
    norm, erank, stable = values.square().sum(-1).sqrt(), entropy_rank(values), stable_rank(values)

    def means(per_layer: Tensor) -> dict[str, float]:
        return {group: round(float(per_layer[numbers].mean()), 6) for group, numbers in sample.groups.items()}

    columns = torch.stack([erank, stable, norm], dim=1)  # layers 3
    return {"erank": means(erank), "stable": means(stable), "norm": means(norm), "drift": means(sample.drift),
            "blocks": {block: _rounded(columns[numbers].mean(0)) for block, numbers in sample.blocks.items()},
            "spectrum": {block: _shape(values[numbers].mean(0)) for block, numbers in sample.blocks.items()},
            "orth_error": sample.orth_error}


def _shape(spectrum: Tensor) -> Sequence[float]:
    """The first of falling singular values, as parts of the largest; zeros where all are."""
    return _rounded(spectrum[:TOLD] / spectrum[0].clamp_min(torch.finfo(spectrum.dtype).tiny))


def _products(adapter: Adapter, grams: dict[str, Tensor]) -> tuple[Tensor | None, Tensor]:
    """up^T up and down down^T of the change of weight, layer by layer; a diagonal S is its own spectrum."""
    layout, method = adapter.layout, adapter.method
    if adapter.frozen is not None or method.manifold == () and "core" in adapter.leaves:
        pair = {key: stack.double() for key, stack in adapter.pair_stacks().items()}
        grams = {key: gram(stack, stack) for key, stack in pair.items()}
    elif "core" in adapter.leaves:
        core = adapter.leaves["core"].double()[layout.order("up", adapter.skip.device)]
        return None, core.abs().sort(-1, descending=True).values if core.ndim == 2 else core.mT @ core
    down = _in_layer_order(adapter, grams, "down")
    return (None if "up" in method.manifold and adapter.frozen is None else _in_layer_order(adapter, grams, "up")), down


def singular_values(gram_up: Tensor | None, gram_down: Tensor) -> Tensor:
    """Of up @ down from up^T up and down down^T, [L, r, r] in fp64 each -> [L, r], falling.

    sigma^2 are the eigenvalues of R^T (down down^T) R with R R^T = up^T up; without gram_up, up being orthonormal,
    those of gram_down. What rounding leaves of an exact zero, such as a start minus itself, is 0.
    """
    if gram_up is None:
        sigma = torch.linalg.eigvalsh(gram_down).clamp_min(0).sqrt().flip(-1)
        return torch.where(sigma > 1e-7 * _trace(gram_down).sqrt()[:, None], sigma, 0.0)
    values, vectors = torch.linalg.eigh(gram_up)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    sigma = torch.linalg.eigvalsh(root.mT @ gram_down @ root).clamp_min(0).sqrt().flip(-1)
    size = (_trace(gram_up) * _trace(gram_down)).sqrt()
    return torch.where(sigma > 1e-7 * size[:, None], sigma, 0.0)


def entropy_rank(values: Tensor) -> Tensor:
    """exp(-sum p ln p) with p = sigma / sum(sigma), [L, r] -> [L]; 0 where all are zero."""
    total = values.sum(-1, keepdim=True)
    p = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    return torch.where(total[:, 0] > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def stable_rank(values: Tensor) -> Tensor:
    """|delta|_F^2 / sigma_1^2, [L, r] -> [L]; 0 where all are zero."""
    squares = values.square()
    return torch.where(squares[:, 0] > 0, squares.sum(-1) / squares[:, 0].clamp_min(1e-300), 0.0)


def _in_layer_order(adapter: Adapter, stacks: dict[str, Tensor], kind: str) -> Tensor:
    """The rows of all stacks of a kind, one a layer."""
    rows = torch.cat([stacks[key] for key in adapter.layout.pair_shapes() if key.startswith(kind + ".")])
    return rows[adapter.layout.order(kind, rows.device)]


def _drift(start: Tensor, factor: Tensor, own: Tensor | None) -> Tensor:
    """Per matrix; NaN for one that started at zero. start: an orthonormal basis; own: factor^T factor if not I."""
    across = gram(start.to(factor.dtype), factor).double()  # Q0^T Y
    whitened = across.mT
    if own is not None:  # |Q0^T Q|_F^2 = tr(X G^-1 X^T) with X = Q0^T Y, G = Y^T Y
        eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
        whitened, _ = torch.linalg.solve_ex(own + (1e-12 * _trace(own)[:, None, None] + 1e-300) * eye, across.mT)
    kept = (across.mT * whitened).sum((-2, -1)) / factor.shape[-1]
    return torch.where(start.abs().amax((1, 2)) > 0, (1 - kept).clamp(0, 1), torch.nan)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _identity_error(matrices: Tensor) -> Tensor:
    return (matrices - torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)).abs().amax()


def _rounded(values: Tensor) -> Sequence[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
