"""Block offload: frozen blocks' weights live in locked host memory and come to the device shortly before they are
used."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.gpu import free_memory

BUFFERS = 2  # one in use, one being filled
ALIGNMENT = 256  # bytes: what kernels expect of a tensor's beginning
PAGE = 4096


@dataclass(frozen=True)
class Piece:
    """A tensor of a block and where it lies in the block's bytes."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, data: Tensor) -> Tensor:
        """It, in a block's bytes (n, uint8)."""
        length = self.tensor.numel() * self.tensor.element_size()
        return data[self.start : self.start + length].view(self.tensor.dtype).as_strided(self.shape, self.stride)


@dataclass
class Block:
    """An offloaded block: its tensors, and its bytes on the host."""

    pieces: list[Piece]
    host: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))  # n, uint8

    @property
    def size(self) -> int:
        return padded(self.pieces[-1].start + self.pieces[-1].tensor.numel() * self.pieces[-1].tensor.element_size())

    def point_to(self, data: Tensor) -> None:
        """Let the tensors, which modules hold, read these bytes."""
        for piece in self.pieces:
            piece.tensor.data = piece.view(data)


class Offload:
    """Keeps `count` of a model's blocks on the host, spread evenly, and fetches each one block ahead of its use.

    Fetching follows the order of execution: forward, and in the backward pass, where gradient checkpointing runs each
    block once more, from the last to the first.  Offloaded blocks must therefore be checkpointed: without that, the
    backward pass would read weights that have left.  Weights are frozen: nothing is ever written back.  On a GPU the
    copies run on a stream of their own, and a buffer is filled again only after everything that was enqueued before.
    On a CPU it does the same, one after the other.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device) -> None:
        """blocks: all repeated blocks in the order of execution.  Raises UserError when the host's memory cannot be
        locked."""
        self.device, self.numbers = device, spread(len(blocks), count)
        self.blocks = _lay_out(blocks, self.numbers)
        self.locks: list[weakref.finalize] = []
        for block in self.blocks:  # one by one: where the weights come from the host, it never holds them twice
            block.host = self._locked(block.size)
            for piece in block.pieces:
                piece.view(block.host).copy_(piece.tensor)
            block.point_to(block.host)
        largest = max((block.size for block in self.blocks), default=0)
        self.buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in self.blocks[:BUFFERS]]
        self.held: list[int | None] = [None] * len(self.buffers)  # which block each buffer has
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready = [torch.cuda.Event() for _ in self.buffers] if self.stream else []
        self.hooks = [blocks[number].register_forward_pre_hook(self._hook(index))
                      for index, number in enumerate(self.numbers)]
        free_memory()

    @property
    def host_bytes(self) -> int:
        return sum(block.size for block in self.blocks)

    def remove(self) -> None:
        """Give the blocks their weights on the device back, for good."""
        for hook in self.hooks:
            hook.remove()
        for block in self.blocks:
            for piece in block.pieces:
                piece.tensor.data = torch.empty_strided(
                    piece.shape, piece.stride, dtype=piece.tensor.dtype, device=self.device).copy_(
                    piece.view(block.host))
        if self.stream is not None:
            torch.cuda.synchronize(self.device)
        for unlock in self.locks:
            unlock()
        self.blocks, self.hooks, self.buffers, self.held, self.locks = [], [], [], [], []

    def _hook(self, index: int) -> Any:
        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._enter(index)

        return enter

    def _enter(self, index: int) -> None:
        """A block is about to run: have it here, and send for the next one."""
        if index not in self.held:
            self._fetch(index, self._other(self.latest))
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[self.held.index(index)])
        self.latest = index
        follower = self._follower(index)
        if follower is not None and follower not in self.held:
            self._fetch(follower, self._other(index))

    latest: int | None = None  # the block that ran last

    def _follower(self, index: int) -> int | None:
        """The block that will run after this one; None: another pass begins, with a block that is here."""
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass: checkpointing runs the block again
            return index - 1 if index else None
        if index + 1 < len(self.blocks):
            return index + 1
        return None if torch.is_grad_enabled() else 0  # the backward pass begins here; without one, the next forward

    def _other(self, index: int | None) -> int:
        """A buffer that a block does not have."""
        return next((number for number, held in enumerate(self.held) if held is None or held != index), 0)

    def _fetch(self, index: int, buffer: int) -> None:
        """Copy a block to a buffer, once all that is enqueued by now, which may still read the buffer, is done."""
        if (old := self.held[buffer]) is not None:
            self.blocks[old].point_to(self.blocks[old].host)
        block = self.blocks[index]
        target = self.buffers[buffer][: block.size]
        if self.stream is None:
            target.copy_(block.host)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                target.copy_(block.host, non_blocking=True)
                self.ready[buffer].record(self.stream)
        block.point_to(target)
        self.held[buffer] = index

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


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All frozen tensors of a module; those of quantised layers are buffers."""
    return (tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad)


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _lay_out(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> list[Block]:
    """Where each tensor of the chosen blocks lies in its block's bytes; what blocks share stays where it is."""
    found = [list({id(tensor): tensor for tensor in tensors_of(block)}.values()) for block in blocks]
    users = Counter(storage for tensors in found
                    for storage in {tensor.untyped_storage().data_ptr() for tensor in tensors})
    laid = []
    for number in numbers:
        pieces, start = [], 0
        for tensor in found[number]:
            if tensor.numel() and users[tensor.untyped_storage().data_ptr()] == 1:
                stride = tensor.stride() if _dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
                pieces.append(Piece(tensor, start, tuple(tensor.shape), stride))
                start += padded(tensor.numel() * tensor.element_size())
        laid.append(Block(pieces))
    return laid


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie one beside the other, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
