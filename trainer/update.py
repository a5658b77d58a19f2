"""One optimizer step with everything around it, eager or as one CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.adapters.bank import Adapter
from trainer.optim import clip_grad_norm

EAGER_CALLS = 3  # before a graph is captured: libraries make their handles and work spaces at first use


class Update:
    """Clip, guard, manifold, optimizer, manifold, average, zero the gradients: `norm = update(loss)`.

    On a GPU the fourth call captures all of it in a CUDA graph, which later calls replay (a second one for steps at
    which the adapter measures its factors); bitsandbytes optimizers stay eager. The learning rate is set before the
    call with `optim.set_lr`, which writes in place.
    """

    def __init__(self, adapter: Adapter, optimizer: Optimizer, max_norm: float) -> None:
        self.adapter, self.optimizer, self.max_norm = adapter, optimizer, max_norm
        device = adapter.skip.device
        self.loss = torch.zeros((), device=device)
        self.norm = torch.zeros((), dtype=adapter.parameters()[0].dtype, device=device)
        self.capturable = device.type == "cuda" and getattr(optimizer, "capturable_step", True)
        self.calls = 0
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}  # by what `Adapter.begin_step` says

    def __call__(self, loss: Tensor) -> Tensor:
        """Take the step for gradients already accumulated; returns their norm, a buffer that the next call reuses."""
        self.loss.copy_(loss.detach())
        self.calls += 1
        measures = self.adapter.begin_step()
        if not self.capturable or self.calls <= EAGER_CALLS:
            self._step()
            return self.norm
        if measures not in self.graphs:
            self.graphs[measures] = torch.cuda.CUDAGraph()
            pool = self.graphs[not measures].pool() if (not measures) in self.graphs else None
            with torch.cuda.graph(self.graphs[measures], pool=pool, capture_error_mode="thread_local"):
                self._step()
        self.graphs[measures].replay()
        return self.norm

    def _step(self) -> None:
        adapter = self.adapter
        self.norm.copy_(clip_grad_norm(adapter.parameters(), self.max_norm))
        adapter.guard(self.loss, self.norm)
        adapter.before_step()
        self.optimizer.step()
        adapter.after_step()
        adapter.ema_update()
        adapter.zero_grad()
