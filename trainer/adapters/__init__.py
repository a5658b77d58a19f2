"""Low-rank adapters for a list of frozen layers: `build` makes one, `Adapter` carries it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from trainer.adapters.bank import Adapter
from trainer.adapters.dora import Magnitude
from trainer.adapters.layout import Layout
from trainer.adapters.lora import LoRA
from trainer.adapters.stella import StelLA, TriLoRA
from trainer.adapters.step_rule import ManifoldRule
from trainer.adapters.stiefel import StiefelLoRA
from trainer.adapters.target import Target, check_targets
from trainer.errors import UserError

__all__ = ["Adapter", "Target", "build", "median_size"]

METHODS = {"lora": LoRA, "stiefel": StiefelLoRA, "stella": StelLA, "trilora": TriLoRA}


def build(targets: Sequence[Target], *, method: str, rank: int, init: str = "default", dora: bool = False,
          retraction: str = "default", dropout: float = 0.0, seed: int = 0, device: torch.device | str = "cpu",
          ema_decay: float | None = None, diagonal_s: bool = False, scale_dim: float | None = None,
          dtype: torch.dtype = torch.float32) -> Adapter:
    """An adapter over the targets, not yet installed; its scale alpha/rank is 1.

    method: lora, stiefel, stella or trilora. init and retraction: "default" is the method's own. ema_decay: None or 0
    keeps no average. diagonal_s, scale_dim: StelLA's options; scale_dim None takes the median size of the factors,
    0 switches gradient scaling off. dtype: of the master weights. Raises UserError if rank or init does not fit.
    """
    check_targets(targets, rank)
    layout = Layout(tuple(targets), rank)
    kind = METHODS[method]
    if init not in kind.inits:
        raise UserError(f"adapter.init = {init!r} does not go with adapter.method = {method!r}: "
                        f"choose one of {', '.join(kind.inits)}")
    chosen = kind(layout, diagonal_s) if issubclass(kind, StelLA) else kind(layout)
    with torch.no_grad():
        leaves = {key: torch.zeros(shape, dtype=dtype, device=device) for key, shape in chosen.shapes().items()}
        frozen = chosen.start(leaves, init, torch.Generator().manual_seed(seed))
        magnitude = Magnitude(layout, dtype) if dora else None
        if magnitude is not None:
            pair = chosen.pair(leaves)
            if frozen is not None:
                pair = {key: torch.cat([stack, frozen[key]], dim=-1) for key, stack in pair.items()}
            leaves |= magnitude.start(pair)
    adapter = Adapter(layout, chosen, leaves, frozen, magnitude, dropout, ema_decay)
    if method == "stella":
        factors = adapter.on_manifold().values()
        name = "polar" if retraction == "default" else retraction
        scale_dim = median_size(targets) if scale_dim is None else scale_dim
        adapter.step_rule = ManifoldRule(factors, name, scale_dim)
    return adapter


def median_size(targets: Sequence[Target]) -> float:
    """Of the factors: the d of StelLA's gradient scaling, when none is chosen."""
    return statistics.median(size for target in targets for size in (target.rows, target.columns))
