"""Counts the bytes that a computation holds at its peak, by running it on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
GRAIN = 512  # bytes: CUDA tensors take multiples of it


class Alive(TorchDispatchMode):
    """Follows the storages that operations make until they are let go: `now` and `peak` in bytes.

    What was there before is not counted; give it as `known`, since views of it come by.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]  # held, so that no other storage takes its place
        self.seen = {storage._cdata for storage in self.known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class FlashAttention(torch.autograd.Function):
    """Holds what the GPU's fused attention holds (Dao 2023): never the matrix of scores, but each row's log-sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sum = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        work = q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(log_sum)  # of dq; of rows' sums
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del work
        return found


class FusedNorm(torch.autograd.Function):
    """Holds what the GPU's fused RMS norm holds: its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Operations that a GPU does in one kernel, and that elsewhere fall into parts which hold more, as stand-ins."""
    attention, norm = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = lambda query, key, value, *rest, **options: FlashAttention.apply(query, key, value)
    F.rms_norm = lambda x, *rest, **options: FusedNorm.apply(x)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm
