"""How much of its rank an adapter uses: singular values of the change of weight, from r x r matrices only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.adapters.bank import Adapter
from trainer.manifold import exact_arithmetic


@torch.no_grad()
def measure(adapter: Adapter) -> dict[str, Any]:
    """Means over each group's layers, by group name; waits for the device once.

    erank: exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007), 0 for a zero change. stable:
    |delta|_F^2 / sigma_1^2. norm: |delta|_F. spectrum: the singular values, falling. drift: how far the subspaces of
    up and down have turned since the start, 0 to 1 (1 - |Q0^T Q|_F^2 / r for orthonormal bases). orth_error: max
    |X^T X - I| of all factors on the manifold, or None for a method without.
    """
    pair = adapter.pair_stacks()
    device = next(iter(pair.values())).device
    with exact_arithmetic(device):
        grams = {kind: _in_layer_order(adapter, pair, pair, kind) for kind in ("up", "down")}  # layers r r
        trained = pair if adapter.frozen is None else adapter.method.pair(adapter.leaves)
        drifts = [_drift(adapter, trained, kind, grams[kind] if trained is pair else None) for kind in ("up", "down")]
        errors = [_orthogonality(leaf) for leaf in adapter.on_manifold().values()]
    drift = torch.stack(drifts).nanmean(0).nan_to_num(0.0)
    error = torch.stack(errors).amax() if errors else torch.full((), torch.nan, device=device)
    rank = grams["up"].shape[-1]
    packed = torch.cat([grams["up"].flatten(1), grams["down"].flatten(1), drift.double()[:, None]], dim=1)
    host = torch.cat([packed.flatten(), error.double()[None]]).cpu()  # the one wait
    rows = host[:-1].view(len(packed), -1)
    up, down = rows[:, : rank * rank].view(-1, rank, rank), rows[:, rank * rank : -1].view(-1, rank, rank)
    values = singular_values(up, down)
    return _summary(adapter, values, rows[:, -1]) | {"orth_error": None if error.isnan() else float(host[-1])}


def singular_values(gram_up: Tensor, gram_down: Tensor) -> Tensor:
    """Of up @ down from up^T up and down down^T, [L, r, r] in fp64 each -> [L, r], falling.

    sigma^2 are the eigenvalues of R^T (down down^T) R with R R^T = up^T up. What rounding leaves of an exact zero,
    such as a start minus itself, is 0.
    """
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


def _in_layer_order(adapter: Adapter, left: dict[str, Tensor], right: dict[str, Tensor], kind: str) -> Tensor:
    """left^T right of every stack of a kind, in fp64, one row a layer."""
    products = [left[key].double().mT @ right[key].double() for key in right if key.startswith(kind + ".")]
    return torch.cat(products)[adapter.layout.order(kind, products[0].device)]


def _drift(adapter: Adapter, pair: dict[str, Tensor], kind: str, gram: Tensor | None) -> Tensor:
    """Per layer, without the frozen start pair; NaN for a layer whose factor started at zero."""
    gram = _in_layer_order(adapter, pair, pair, kind) if gram is None else gram
    across = _in_layer_order(adapter, adapter.start, pair, kind)
    before = _in_layer_order(adapter, adapter.start, adapter.start, kind)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    tiny = (1e-12 * _trace(gram)[:, None, None] + 1e-300) * eye
    # |Q0^T Q|_F^2 = tr(G0^-1 X G^-1 X^T) with X = Y0^T Y, G = Y^T Y
    left, _ = torch.linalg.solve_ex(before + tiny, across)
    right, _ = torch.linalg.solve_ex(gram + tiny, across.mT)
    kept = (left * right.mT).sum((-2, -1)) / gram.shape[-1]
    return torch.where(_trace(before) > 0, (1 - kept).clamp(0, 1), torch.nan)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _orthogonality(leaf: Tensor) -> Tensor:
    gram = leaf.double().mT @ leaf.double()
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax()


def _summary(adapter: Adapter, values: Tensor, drift: Tensor) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[int]] = {}
    for number, target in enumerate(adapter.layout.targets):
        groups.setdefault(target.group, []).append(number)
    norm, erank, stable = values.square().sum(-1).sqrt(), entropy_rank(values), stable_rank(values)

    def means(per_layer: Tensor) -> dict[str, float]:
        return {group: round(float(per_layer[numbers].mean()), 6) for group, numbers in groups.items()}

    return {"erank": means(erank), "stable": means(stable), "norm": means(norm), "drift": means(drift),
            "spectrum": {group: _rounded(values[numbers].mean(0)) for group, numbers in groups.items()}}


def _rounded(values: Tensor) -> Sequence[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
