"""Fetches frozen blocks' weights one block ahead of their use, from wherever they lie meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BUFFERS = 2  # one in use, one being filled
ALIGNMENT = 256  # bytes: what kernels expect of a tensor's beginning


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
    """A block's tensors, which modules hold, and how its bytes come and go."""

    pieces: list[Piece]

    @property
    def size(self) -> int:
        """Bytes that it takes in a buffer."""
        if not self.pieces:
            return 0
        last = self.pieces[-1]
        return padded(last.start + last.tensor.numel() * last.tensor.element_size())

    def point_to(self, data: Tensor) -> None:
        """Let the tensors read these bytes."""
        for piece in self.pieces:
            piece.tensor.data = piece.view(data)

    def leave(self) -> None:
        """Let go of the buffer that the tensors read."""
        raise NotImplementedError

    def copy_to(self, target: Tensor) -> None:
        """Enqueue the copy of the block's bytes (`size`, uint8)."""
        raise NotImplementedError


class Fetching:
    """Brings each of some blocks to the device one block ahead of its use.

    It follows the order of execution: forward, and in the backward pass, where gradient checkpointing runs each block
    once more, from the last to the first.  Fetched blocks must therefore be checkpointed: without that, the backward
    pass would read weights that have left.  Weights are frozen: nothing is ever written back.  On a GPU the copies run
    on a stream of their own, and a buffer is filled again only after everything that was enqueued before.  On a CPU it
    does the same, one after the other.
    """

    SOURCE = ""  # where the weights come from, in words
    latest: int | None = None  # the block that ran last

    def _follow(self, modules: Sequence[nn.Module], blocks: Sequence[Block], device: torch.device) -> None:
        """From now on fetch the weights of `modules`, in the order of their execution."""
        self.device, self.blocks = device, list(blocks)
        largest = max((block.size for block in self.blocks), default=0)
        self.buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in self.blocks[:BUFFERS]]
        self.held: list[int | None] = [None] * len(self.buffers)  # which block each buffer has
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for buffer in self.buffers if self.stream else ():
            buffer.record_stream(self.stream)  # lest what is sent for ahead arrive in memory that was given back
        self.ready = [torch.cuda.Event() for _ in self.buffers] if self.stream else []
        self.hooks = [module.register_forward_pre_hook(self._hook(index)) for index, module in enumerate(modules)]

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
            self.blocks[old].leave()
        block = self.blocks[index]
        target = self.buffers[buffer][: block.size]
        if self.stream is None:
            block.copy_to(target)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                block.copy_to(target)
                self.ready[buffer].record(self.stream)
        block.point_to(target)
        self.held[buffer] = index


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All frozen tensors of a module; those of quantised layers are buffers."""
    return (tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad)


def padded(size: int, grain: int = ALIGNMENT) -> int:
    return -(-size // grain) * grain


def lay_out(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> list[list[Piece]]:
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
        laid.append(pieces)
    return laid


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie one beside the other, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
