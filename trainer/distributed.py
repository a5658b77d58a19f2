"""Several processes that train one run: what they agree on, how they share work, and how they part when one is lost."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.control import Requests, Stopped
from trainer.errors import UserError
from trainer.faults import describe, out_of_memory
from trainer.run import Run

BETWEEN_STEPS = timedelta(minutes=3)  # after which a process that does not answer counts as lost; compiling takes long
AT_LENGTH = timedelta(hours=6)  # the same while pictures are encoded, drawn or waited for
ON_THE_GPUS = timedelta(minutes=30)
AT_THE_END = timedelta(seconds=30)  # that a process waits for the others when all is done
LOOK = 1.0  # seconds between two looks whether another process was asked to stop

T = TypeVar("T")
J = TypeVar("J")


class Lost(UserError):
    """Another process of this run is gone, so that this one cannot go on."""


class Fault(NamedTuple):
    """What went wrong in a process, in a form that can be sent."""

    kind: str
    text: str


class Elsewhere(Exception):
    """A fault of another process that was told to this one inside of work that the other is out of already."""

    def __init__(self, depth: int, fault: Fault) -> None:
        super().__init__(fault.text)
        self.depth, self.fault = depth, fault


class World:
    """The processes of a run; by itself one process, for which everything here is nothing.

    Hosts speak over gloo, apart from the GPUs: a word a step takes them some 0.1 ms and waits for no kernel, and a
    process that dies is noticed at once, since its connection closes. Gradients alone go from GPU to GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None,
                 local_size: int = 0) -> None:
        """local_size: how many of the processes this machine has; 0: all of them."""
        self.rank, self.size, self.local_rank, self.first = rank, size, local_rank, rank == 0
        self.local_size = local_size or size
        self._store, self._depth = store, 0
        self._quick = dist.new_group(backend="gloo", timeout=BETWEEN_STEPS) if size > 1 else None
        self._patient = dist.new_group(backend="gloo", timeout=AT_LENGTH) if size > 1 else None

    def together(self, work: Callable[[], T], quick: bool = False) -> list[T]:
        """Do `work` in every process and wait for all; returns all results, by rank.

        What goes wrong in one is raised in all, so that none waits for another in vain: `Stopped`, a lack of memory
        and a `UserError` as what they are, anything else as a `RuntimeError` with its text. May be nested; a fault
        between two inner calls ends the outer one everywhere. `Lost` is raised when a process is gone.
        """
        if self.size == 1:
            return [work()]
        self._depth += 1
        depth, own, result = self._depth, None, None
        try:
            result = work()
        except Lost:
            raise
        except Elsewhere as told:
            if told.depth != depth:
                raise
            raise rebuilt(told.fault) from None
        except Exception as error:
            own = error
        finally:
            self._depth -= 1
        answers = self._gather(depth, own, result, self._quick if quick else self._patient)
        shallow = min(answer[0] for answer in answers)
        fault = next((answer[1] for answer in answers if answer[0] == shallow and answer[1]), None)
        if own is not None:
            raise own
        if fault is not None:
            raise Elsewhere(shallow, fault) if shallow < depth else rebuilt(fault)
        return [answer[2] for answer in answers]

    def from_first(self, work: Callable[[], T]) -> T:
        """Do something in the first process only; every process gets the result."""
        return self.together(lambda: work() if self.first else None)[0]

    def union(self, words: Collection[str]) -> set[str]:
        """The words that any process says, between two steps."""
        return {word for said in self.together(lambda: sorted(words) or None, quick=True) for word in said or ()}

    def part(self, whole: Sequence[J]) -> list[J]:
        """This process's part of a list of work; together the parts are the list."""
        return list(whole[self.rank::self.size])

    def own(self, purpose: str) -> str:
        """The name of a stream of random numbers that is this process's own."""
        return f"{purpose} {self.rank}" if self.rank else purpose

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors equal to the first process's, in place."""
        for tensor in tensors if self.size > 1 else ():
            self._speak(lambda tensor=tensor: dist.broadcast(tensor, 0))

    def add_up(self, tensor: Tensor) -> None:
        """Make a tensor the sum of all processes', in place; on a GPU without waiting for it."""
        self._speak(lambda: dist.all_reduce(tensor))

    def ask_to_stop(self) -> None:
        """Let the other processes know that somebody asked this one to stop."""
        self._tell("stop", "asked")

    def asked_to_stop(self) -> bool:
        """Whether another process was asked to stop."""
        return self._told("stop") is not None

    def farewell(self, error: BaseException) -> None:
        """Say why this process leaves, for those that stay."""
        if not isinstance(error, Lost):
            self._tell("fault", f"process {self.rank + 1} of {self.size}: {describe(error)}")

    def close(self) -> None:
        """Part in peace: no connection closes before every process has come to its end, since one that is still
        listening to the last word would take the others for lost."""
        if self.size > 1:
            self._tell(f"end {self.rank}", "reached")
            with suppress(RuntimeError):  # the process that keeps the store may be gone, which is no harm any more
                self._store.wait([f"end {rank}" for rank in range(self.size)], AT_THE_END)
            dist.destroy_process_group()

    def _gather(self, depth: int, error: Exception | None, result: Any,  # noqa: ANN401
                group: dist.ProcessGroup) -> list[tuple[int, Fault | None, Any]]:
        """Depth, fault and result of every process; where there is neither fault nor result, in one small message."""
        fault = None if error is None else told(error)
        body = b"" if fault is None and result is None else pickle.dumps((fault, result))
        heads = [head.tolist() for head in self._all(torch.tensor([depth, len(body)]), group)]
        if not any(length for _, length in heads):
            return [(place, None, None) for place, _ in heads]
        padded = torch.zeros(max(length for _, length in heads), dtype=torch.uint8)
        padded[:len(body)] = torch.frombuffer(bytearray(body or b"\0"), dtype=torch.uint8)[:len(body)]
        bodies = self._all(padded, group)
        return [(place, *(pickle.loads(data[:length].numpy().tobytes()) if length else (None, None)))  # noqa: S301
                for (place, length), data in zip(heads, bodies)]

    def _all(self, tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._speak(lambda: dist.all_gather(found, tensor, group=group))
        return found

    def _speak(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = self._told("fault")
            raise Lost(f"another process of this run failed ({reason})" if reason else
                       "another process of this run is gone: it was killed, or its computer or GPU failed") from error

    def _tell(self, key: str, text: str) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # the process that keeps the store may be gone
                self._store.set(key, text)

    def _told(self, key: str) -> str | None:
        with suppress(RuntimeError):
            if self._store is not None and self._store.check([key]):
                return self._store.get(key).decode()
        return None


ALONE = World()


class SharedRequests(Requests):
    """Requests to a run of one process or several: whichever is asked to stop, and looks first, tells the others."""

    def __init__(self, run: Run, world: World) -> None:
        super().__init__(run)
        self.world, self._looked, self._passed_on = world, time.monotonic(), False

    def stop_asked(self) -> bool:
        """Whether this process, or one that has told, was asked to stop."""
        if not super().stop_asked() and self.world.size > 1 and time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            self._stop = self._passed_on = self.world.asked_to_stop()
        if self._stop and not self._passed_on:
            self._passed_on = True
            self.world.ask_to_stop()
        return self._stop


def join(rank: int, size: int, local_rank: int, local_size: int = 0) -> World:
    """Meet the other processes, where the environment that torchrun or accelerate made says.

    local_size: the processes of this machine; 0 where that was not said, which takes them all for its own.
    Raises `UserError` when they do not come.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(minutes=5)))
        dist.init_process_group(backend, store=dist.PrefixStore("run", store), rank=rank, world_size=size,
                                timeout=ON_THE_GPUS)
        return World(rank, size, local_rank, dist.PrefixStore("words", store), local_size)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {size} processes of this run did not find one another: {error}; check the addresses "
                        "and ports that they were started with") from error


def told(error: Exception) -> Fault:
    """A fault as it is sent."""
    if isinstance(error, Stopped):
        return Fault("stopped", "")
    if out_of_memory(error):
        return Fault("memory", str(error))
    return Fault("user" if isinstance(error, UserError) else "other", describe(error))


def rebuilt(fault: Fault) -> Exception:
    """What another process sent, to be raised here."""
    kinds = {"stopped": Stopped, "memory": torch.OutOfMemoryError, "user": UserError}
    return kinds.get(fault.kind, RuntimeError)(fault.text)
