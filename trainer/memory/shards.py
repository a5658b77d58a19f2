"""Shares a frozen model between the GPUs of one computer: each keeps a part of every block, and reads the others' parts
shortly before a block is used.

The parts are read from the other GPUs' memory by the reader alone; nobody has to answer.  Collective operations, as
FSDP's, would tie the processes together inside of each block: one that draws a picture more, runs out of memory or is
told to stop would leave the others waiting for ever.  Between computers nothing is shared; each holds the whole model.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed import World
from trainer.errors import UserError, first_line
from trainer.memory.blocks import repeated_blocks
from trainer.memory.fetch import ALIGNMENT, Block, Fetching, lay_out, padded
from trainer.memory.plan import Plan

T = TypeVar("T")


class Neighbours(NamedTuple):
    """The processes of one computer, which can hold a model together."""

    world: World
    ranks: list[int]
    group: dist.ProcessGroup | None = None  # where they have GPUs

    @property
    def place(self) -> int:
        """This process's number among them."""
        return self.ranks.index(self.world.rank)

    def all(self, word: T) -> list[T]:
        """What each of them says."""
        said = self.world.together(lambda: word)
        return [said[rank] for rank in self.ranks]


def meet(world: World, device: torch.device) -> Neighbours:
    """Find the processes of this computer.  Raises `UserError` with the reason where they cannot share a model."""
    told = world.together(lambda: (platform.node(), device.index))
    hosts = {host: [rank for rank, (other, _) in enumerate(told) if other == host] for host, _ in told}
    ranks, numbers = hosts[told[world.rank][0]], [number for _, number in told]
    if min(map(len, hosts.values())) == 1 or len(set(map(len, hosts.values()))) > 1:
        raise UserError("it needs two GPUs or more in each computer, and as many in one as in the other")
    if device.type != "cuda":
        return Neighbours(world, ranks)
    if not all(world.together(lambda: len({numbers[rank] for rank in ranks}) == len(ranks) and all(
            torch.cuda.can_device_access_peer(device, numbers[rank]) for rank in ranks if rank != world.rank))):
        raise UserError("the GPUs cannot read one another's memory (or each process sees its own GPU only), so that "
                        "weights would go by way of the computer's memory: memory.offload_blocks is as fast")
    groups = {host: dist.new_group(members, backend="gloo") for host, members in hosts.items()}
    neighbours = Neighbours(world, ranks, groups[told[world.rank][0]])
    try_out(neighbours, GpuParts(neighbours, device), device)
    return neighbours


def try_out(neighbours: Neighbours, parts: Parts, device: torch.device) -> None:
    """Share some bytes.  What goes wrong in one process is a `UserError` in all."""
    own = torch.full((ALIGNMENT,), neighbours.place, dtype=torch.uint8, device=device)

    def look() -> None:
        [found] = parts.open()
        if any(int(part.clone()[-1]) != place for place, part in enumerate(found)):
            raise RuntimeError("what was read is wrong")

    try:
        neighbours.world.together(lambda: parts.put(own))  # by itself: in `open` others would wait for one that cannot
        neighbours.world.together(look)
    except (RuntimeError, ImportError, AttributeError) as error:
        raise UserError(f"the GPUs' memory cannot be read from other processes here ({first_line(error)})") from error


class Parts(Protocol):
    """This process's parts of all blocks, and the way to the others'."""

    def put(self, part: Tensor) -> None:
        """Keep a part of one more block (n, uint8)."""

    def open(self) -> list[Sequence[Tensor]]:
        """Of each block all parts, which anyone may read from now on."""


class GpuParts:
    """Parts in GPU memory that the other processes map (CUDA's virtual memory, by torch's symmetric memory): it stays
    readable although the process that made it dies."""

    def __init__(self, neighbours: Neighbours, device: torch.device) -> None:
        self.neighbours, self.device = neighbours, device
        self.own: list[Tensor] = []
        self.handles: list[Any] = []  # the views of others' memory live as long as these

    def put(self, part: Tensor) -> None:
        from torch.distributed import _symmetric_memory as symmetric  # late: not every build has it

        own = symmetric.empty(len(part), dtype=torch.uint8, device=self.device)
        self.own.append(own.copy_(part))

    def open(self) -> list[Sequence[Tensor]]:
        from torch.distributed import _symmetric_memory as symmetric

        torch.cuda.synchronize(self.device)
        self.handles = [symmetric.rendezvous(own, self.neighbours.group) for own in self.own]
        self.neighbours.world.together(lambda: None)  # all have written theirs
        count = len(self.neighbours.ranks)
        return [[handle.get_buffer(place, (len(own),), torch.uint8) for place in range(count)]
                for own, handle in zip(self.own, self.handles)]


class FileParts:
    """Parts in files that all processes map: on a CPU, where the system keeps each in memory once for all."""

    def __init__(self, neighbours: Neighbours) -> None:
        self.neighbours = neighbours
        self.own: list[Tensor] = []

    def put(self, part: Tensor) -> None:
        self.own.append(part.clone())

    def open(self) -> list[Sequence[Tensor]]:
        sizes = [len(part) for part in self.own]
        with tempfile.NamedTemporaryFile(delete=False) as file:
            for part in self.own:
                file.write(part.numpy())
        self.own.clear()
        try:
            paths = self.neighbours.all(file.name)
            whole = [torch.from_file(path, shared=True, size=sum(sizes), dtype=torch.uint8) for path in paths]
            self.neighbours.world.together(lambda: None)  # all have mapped mine
        finally:
            with suppress(OSError):  # Windows keeps what is mapped
                Path(file.name).unlink()
        return list(zip(*(data.split(sizes) for data in whole)))


@dataclass
class SharedBlock(Block):
    """A block whose bytes lie in equal parts with all neighbours."""

    count: int = 1
    parts: Sequence[Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        return padded(super().size, ALIGNMENT * self.count)

    def leave(self) -> None:
        """The tensors keep their shapes, and one number that nobody can take for a weight."""
        for piece in self.pieces:
            piece.tensor.data = nothing(piece.tensor.dtype, piece.tensor.device).expand(piece.shape)

    def copy_to(self, target: Tensor) -> None:
        for part, place in zip(self.parts, target.chunk(self.count)):
            place.copy_(part, non_blocking=True)


@cache
def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stands for a weight that is not here; made once, since the host waits until it has come to a GPU."""
    return torch.tensor(float("nan") if dtype.is_floating_point else 0, device=device).to(dtype)


class Shards(Fetching):
    """A model's repeated blocks, of each of which this process keeps its part.

    Give `keep` to what loads the weights, so that no more than one block is ever held whole; then `open`.
    """

    SOURCE = "the other GPUs"

    def __init__(self, neighbours: Neighbours, device: torch.device) -> None:
        self.device, self.count, self.place = device, len(neighbours.ranks), neighbours.place
        self.parts: Parts = GpuParts(neighbours, device) if device.type == "cuda" else FileParts(neighbours)
        self.found: dict[int, SharedBlock] = {}  # by the module's id
        self.kept = 0  # bytes of this process's parts

    @property
    def uncounted(self) -> int:
        """Bytes of GPU memory that torch's own count lacks."""
        return self.kept if self.device.type == "cuda" else 0

    def keep(self, module: nn.Module) -> None:
        """Take over a block's weights, which are on the device: this process's part of them."""
        [pieces] = lay_out([module], [0])
        block = SharedBlock(pieces, self.count)
        whole = torch.zeros(block.size, dtype=torch.uint8, device=self.device)
        for piece in pieces:
            piece.view(whole).copy_(piece.tensor)
        part = whole.chunk(self.count)[self.place]
        self.parts.put(part)
        self.kept += len(part)
        block.leave()
        self.found[id(module)] = block

    def open(self, modules: Sequence[nn.Module]) -> None:
        """Find the others' parts, and fetch the blocks from them from now on; `modules` in the order of execution."""
        for block, parts in zip(self.found.values(), self.parts.open()):
            block.parts = parts
        self._follow(modules, [self.found[id(module)] for module in modules], self.device)
        for number, module in enumerate(modules):
            mine = {id(piece.tensor) for piece in self.blocks[number].pieces}
            for child in module.modules():  # for those that read a weight between two passes
                if any(id(tensor) in mine for tensor in (*child.parameters(recurse=False),
                                                         *child.buffers(recurse=False))):
                    child.fetch_weights = partial(self._enter, number)


def load_shared(family: ModuleType, base: Any, device: torch.device, dtype: torch.dtype, plan: Plan,
                neighbours: Neighbours) -> tuple[nn.Module, Shards]:
    """The denoiser, its blocks shared between neighbours, each of whom calls this; what goes wrong in one is raised
    in all."""
    shards, made = Shards(neighbours, device), []
    neighbours.world.together(lambda: made.append(
        family.load_denoiser(base, device, dtype, plan.quantize, shards.keep)))
    shards.open(repeated_blocks(made[0]))
    return made[0], shards
