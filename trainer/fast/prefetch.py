"""Reads the next micro-batches from the cache while the device computes, into memory that it copies from by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from trainer.data.order import Draw

AHEAD = 2  # micro-batches that are read before their turn

Batch = dict[str, Tensor]


class Prefetcher:
    """A thread that reads micro-batches before they are asked for: `take` gives what `read` would, only sooner.

    On a GPU their memory is locked, so that copies to the device wait for nothing. What is asked for without having
    been sent for is read at once; what was sent for and is no longer wanted is let go.
    """

    def __init__(self, read: Callable[[Sequence[Draw]], Batch], device: torch.device) -> None:
        self.read, self.device = read, device
        self.thread = ThreadPoolExecutor(1, "prefetch", initializer=self._begin)
        self.coming: dict[tuple[Draw, ...], Future[Batch]] = {}
        self.open = True

    def send_for(self, batches: Sequence[Sequence[Draw]]) -> None:
        """Say which micro-batches come next; nothing else will."""
        if not self.open:
            return
        wanted = {tuple(draws): draws for draws in batches[:AHEAD]}
        for key in self.coming.keys() - wanted.keys():
            self.coming.pop(key).cancel()
        for key, draws in wanted.items():
            if key not in self.coming:
                self.coming[key] = self.thread.submit(self._read, draws)

    def take(self, draws: Sequence[Draw]) -> Batch:
        """The tensors of a micro-batch, on the host. What `read` raised is raised here."""
        coming = self.coming.pop(tuple(draws), None)
        return self._read(draws) if coming is None else coming.result()

    def close(self) -> None:
        """Let the thread end; what is being read is waited for, and `take` reads at once from now on."""
        self.open = False
        self.coming.clear()
        self.thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # else locking memory would start CUDA on the first GPU

    def _read(self, draws: Sequence[Draw]) -> Batch:
        batch = self.read(draws)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.device.type == "cuda" else batch
