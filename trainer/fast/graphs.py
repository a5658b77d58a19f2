"""Forward and backward pass of a micro-batch as one CUDA graph for each shape of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.errors import first_line
from trainer.faults import out_of_memory
from trainer.gpu import free_memory
from trainer.memory.plan import FULL

FIRST_PASSES = 2  # of a shape, without a graph: libraries choose their kernels; the last is watched
MOST_SHAPES = 12  # graphs that are held at a time; a graph's own description takes some tens of MB
SPARE = 2.25  # times the activations: once in the graphs' own memory, once for passes without a graph, and gaps

Inputs = dict[str, Tensor]
Key = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


class Waits(Exception):
    """A pass made the host wait for the device, which a graph cannot."""


class Recording(Protocol):
    """What was recorded of a pass, to be done again on the same addresses."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """What graphs are made with; apart from `CudaRecorder` only tests have one."""

    def watched(self, work: Callable[[], Tensor]) -> Tensor:
        """Run a pass; raises `Waits` where it waits for the device."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        """Record a pass without running it; its result's address stays."""

    def allocated(self) -> int:
        """Bytes that tensors take on the device now."""

    def reserved(self) -> int:
        """Bytes that are held for tensors, used or not."""


class CudaRecorder:
    """Records on a stream of its own; all graphs share one pool of memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.failed: list[torch.cuda.CUDAGraph] = []  # the allocator may still ask them

    def watched(self, work: Callable[[], Tensor]) -> Tensor:
        with _no_waiting():
            return work()

    def record(self, work: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        free_memory()  # the pool takes fresh memory, and nothing may be collected meanwhile
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), \
                    torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = work()
        except Exception:
            self.failed.append(graph)
            self._leave_pool()
            raise
        return graph, result

    def _leave_pool(self) -> None:
        """A recording that breaks off leaves the allocator in its pool, where later tensors would be lost."""
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self.pool)
        self.pool = torch.cuda.graph_pool_handle()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)


@contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise Waits from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass
class Captured:
    """The graph of a shape: fill `inputs`, replay, read `loss`."""

    inputs: list[Tensor]
    graph: Recording
    loss: Tensor


class StepGraphs:
    """Runs a micro-batch's pass, `backward(forward(inputs))`, as a graph.

    Gradients add up at the bank's fixed addresses, so a replay does what the pass did. A shape's first passes run as
    they are. `room` is how many bytes tensors may take (0: nobody counts); what does not fit beside a graph, or
    cannot be recorded, runs without one for good, and `tell` says why, once, with `advice` for what does not fit.
    """

    def __init__(self, forward: Callable[[Inputs], Tensor], backward: Callable[[Tensor], None],
                 quiet: Callable[[], None], gradients: Sequence[Tensor], room: int, tell: Callable[[str], None],
                 recorder: Recorder, advice: str = "") -> None:
        """forward: the loss, with fresh weights; backward: adds its gradients up in `gradients`; quiet: makes layers
        let go of the last pass, whose streams are not the recording's."""
        self.forward, self.backward, self.quiet, self.gradients = forward, backward, quiet, gradients
        self.room, self.tell, self.recorder, self.advice = room, tell, recorder, advice
        self.on, self.said = True, False
        self.seen: Counter[Key] = Counter()
        self.activations = 0  # bytes that the largest pass held between forward and backward
        self.captured: dict[Key, Captured] = {}

    def __call__(self, inputs: Inputs) -> Tensor:
        """The loss of a micro-batch whose gradients are added; a buffer that the next call reuses."""
        key = shape_key(inputs)
        self.seen[key] += 1
        if key in self.captured:
            return self._replay(self.captured[key], inputs)
        if not self.on or self.seen[key] < FIRST_PASSES:
            return self._pass(inputs)
        if self.seen[key] == FIRST_PASSES:
            return self._watched(inputs)
        if not self._fits() or not self._make_place(key):
            return self._pass(inputs)
        return self._record(key, inputs)

    def stop(self, why: str) -> None:
        """No graphs from now on; their memory is free again."""
        if self.on:
            self.on = False
            self.drop()
            self.tell(why)

    def drop(self) -> None:
        """Forget all graphs: the model was changed, or its memory is needed."""
        self.quiet()
        self.captured.clear()
        self.seen.clear()
        free_memory()

    def _pass(self, inputs: Inputs) -> Tensor:
        before = self.recorder.allocated()
        loss = self.forward(inputs)
        self.activations = max(self.activations, self.recorder.allocated() - before)
        self.backward(loss)
        return loss.detach()

    def _watched(self, inputs: Inputs) -> Tensor:
        kept = [gradient.clone() for gradient in self.gradients]
        try:
            return self.recorder.watched(lambda: self._pass(inputs))
        except Waits as error:
            reason = first_line(error.__cause__) if error.__cause__ else "it waits for the device"
        torch._foreach_copy_(list(self.gradients), kept)
        self.stop(f"CUDA graphs are not used: a step of this model makes the computer wait for the GPU ({reason})")
        return self._pass(inputs)

    def _fits(self) -> bool:
        need = self.recorder.allocated() + SPARE * self.activations
        if self.captured or not self.room or need <= FULL * self.room:  # graphs share memory: the first decides
            return True
        self.stop(f"CUDA graphs are not used: with them this run would take about {need / 2**30:.1f} GiB of the "
                  f"{self.room / 2**30:.1f} GiB that it may. {self.advice}".rstrip())
        return False

    def _make_place(self, key: Key) -> bool:
        """Whether one more graph may be held; one that is used half as often as this shape gives way."""
        if len(self.captured) < MOST_SHAPES:
            return True
        rarest = min(self.captured, key=self.seen.__getitem__)
        if self.seen[key] < 2 * self.seen[rarest]:
            return False
        del self.captured[rarest]
        return True

    def _record(self, key: Key, inputs: Inputs) -> Tensor:
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        before = self.recorder.reserved()
        self.quiet()
        try:
            graph, loss = self.recorder.record(lambda: self._pass(static))
        except Exception as error:
            reason = explain(error)
        else:
            self.quiet()  # layers would hold the graph's own slices
            self.captured[key] = Captured(list(static.values()), graph, loss)
            self._say(before)
            graph.replay()
            return loss
        self.stop(f"CUDA graphs are not used: {reason}")
        return self._pass(inputs)

    def _say(self, before: int) -> None:
        if not self.said:
            self.said = True
            taken = max(0, self.recorder.reserved() - before) / 2**30
            self.tell("Steps run as CUDA graphs, one for each shape of batch: the same numbers, with less work for "
                      f"the processor. The first one keeps {taken:.1f} GiB of GPU memory, which the others share")

    def _replay(self, captured: Captured, inputs: Inputs) -> Tensor:
        torch._foreach_copy_(captured.inputs, list(inputs.values()))
        captured.graph.replay()
        return captured.loss


def shape_key(inputs: Inputs) -> Key:
    """What a graph is good for: the tensors' names, shapes and dtypes, in their order."""
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())


def explain(error: Exception) -> str:
    """Why a pass could not be recorded, for a person."""
    if out_of_memory(error):
        return "their memory does not fit beside the model's"
    return f"a step of this model cannot be recorded ({first_line(error)})"
