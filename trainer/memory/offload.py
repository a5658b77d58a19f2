"""Block offload: frozen blocks' weights live in locked host memory and come to the device shortly before they are
used."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.gpu import free_memory
from trainer.memory.fetch import Block, Fetching, lay_out

PAGE = 4096


@dataclass
class HostBlock(Block):
    """An offloaded block: its tensors, and its bytes on the host."""

    host: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))  # n, uint8

    def leave(self) -> None:
        self.point_to(self.host)

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self.host, non_blocking=True)


class Offload(Fetching):
    """Keeps `count` of a model's blocks on the host, spread evenly, and fetches each one block ahead of its use."""

    SOURCE = "the computer's memory"

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device) -> None:
        """blocks: all repeated blocks in the order of execution.  Raises UserError when the host's memory cannot be
        locked."""
        self.device, self.numbers = device, spread(len(blocks), count)
        self.blocks = [HostBlock(pieces) for pieces in lay_out(blocks, self.numbers)]
        self.locks: list[weakref.finalize] = []
        for block in self.blocks:  # one by one: where the weights come from the host, it never holds them twice
            block.host = self._locked(block.size)
            for piece in block.pieces:
                piece.view(block.host).copy_(piece.tensor)
            block.leave()
        self._follow([blocks[number] for number in self.numbers], self.blocks, device)
        free_memory()

    @property
    def host_bytes(self) -> int:
        return sum(block.size for block in self.blocks)

    def remove(self, to_device: bool = True) -> None:
        """Stop fetching for good: the blocks have their weights on the device again, or all on the host, from where
        another `Offload` takes them."""
        for hook in self.hooks:
            hook.remove()
        for block in self.blocks:
            block.leave()
            for piece in block.pieces if to_device else ():
                piece.tensor.data = torch.empty_strided(
                    piece.shape, piece.stride, dtype=piece.tensor.dtype, device=self.device).copy_(
                    piece.view(block.host))
        if self.stream is not None:
            torch.cuda.synchronize(self.device)
        for unlock in self.locks:
            unlock()
        self.blocks, self.hooks, self.buffers, self.held, self.locks = [], [], [], [], []

    def _locked(self, size: int) -> Tensor:
        """Bytes on the host, which the GPU reads by itself.  Not torch's own pinned memory: it rounds sizes up to a
        power of two."""
        whole = torch.empty(size + 2 * PAGE, dtype=torch.uint8)  # no page of it is shared with another lock
        start = -whole.data_ptr() % PAGE
        host = whole[start : start + size]
        if self.device.type == "cuda" and size:
            runtime, address = torch.cuda.cudart(), host.data_ptr()
            if int(runtime.cudaHostRegister(address, -(-size // PAGE) * PAGE, 0)) != 0:
                raise UserError(f"the system does not lock {self.host_bytes / 2**30:.1f} GiB of its memory for "
                                "offloaded blocks: close other programs, or make memory.offload_blocks smaller")
            self.locks.append(weakref.finalize(self, runtime.cudaHostUnregister, address))
        return host


def spread(total: int, count: int) -> list[int]:
    """`count` of the numbers 0..total-1, evenly: those that stay give the copies time."""
    return [number for number in range(total) if (number + 1) * count // total > number * count // total]
