"""Brings a step's numbers from the device without making the loop wait for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from trainer.memory.pace import Pace, explain, others_hold
from trainer.record import Recorder
from trainer.sample_losses import SampleLosses

LAG = 2  # steps that an event may come late
SIGN_OF_LIFE = 60.0  # seconds after which a step gets an event whatever `every` says


@dataclass
class _Pending:
    step: int
    lr: float
    wanted: bool  # whether the step gets an event
    sec: float
    items: Sequence[int]  # the images of the step's samples
    numbers: Tensor  # loss, grad_norm, skipped, then what was seen of the samples: on the host, perhaps not there yet
    arrived: torch.cuda.Event | None


class Readback:
    """Holds the last few steps' numbers until they have arrived, then has them recorded."""

    def __init__(self, recorder: Recorder, steps: int, device: torch.device, every: int,
                 samples: SampleLosses | None = None) -> None:
        self.recorder, self.steps, self.device, self.every, self.samples = recorder, steps, device, every, samples
        self.bad_in_row = 0  # non-finite steps, as far as is known
        self._pending: deque[_Pending] = deque()
        self._began = time.perf_counter()
        self._process = psutil.Process()
        self._pace = Pace()
        self._others = others_hold(device) if device.type == "cuda" else 0  # bytes of the GPU's memory at the start
        self._told = time.monotonic()  # when the last event was written
        self._newest = 0  # the last step whose samples are gathered

    def push(self, step: int, loss: Tensor, grad_norm: Tensor, skipped: Tensor, lr: float,
             items: Sequence[int] = (), seen: Tensor | None = None) -> None:
        """Take a step's numbers, all scalars on the device; `skipped` is 1 for a non-finite step.

        items, seen: the images of its samples, and their losses and timesteps as `Session.seen` has them (n 2 b).
        """
        numbers = torch.stack([loss.float(), grad_norm.float(), skipped.float()])
        if seen is not None:
            numbers = torch.cat([numbers, seen.transpose(0, 1).flatten()])  # all losses, then all timesteps
        arrived = None
        if self.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        now = time.perf_counter()
        quiet = time.monotonic() - self._told > SIGN_OF_LIFE
        wanted = step % self.every == 0 or step == self.steps or quiet
        self._told = time.monotonic() if wanted else self._told
        self._pending.append(_Pending(step, lr, wanted, now - self._began, items, numbers, arrived))
        self._began = now
        self._report(LAG if arrived is not None else 0)

    def drain(self) -> None:
        """Record everything that is still on its way."""
        self._report(0)

    def finish(self) -> None:
        """The same, and what was gathered of samples since it was last written down."""
        self.drain()
        self._tell_samples()

    def restart_clock(self, new_pace: bool = False) -> None:
        """Leave out of a step's time what was done between steps (pictures, checkpoints).

        new_pace: from now on steps are of another kind, and their times not to be compared with those before.
        """
        self._began = time.perf_counter()
        self._pace = Pace() if new_pace else self._pace

    def _report(self, keep: int) -> None:
        while len(self._pending) > keep:
            item = self._pending.popleft()
            if item.arrived is not None:
                item.arrived.synchronize()
            loss, grad_norm, skipped, *seen = item.numbers.tolist()
            self.bad_in_row = self.bad_in_row + 1 if skipped else 0
            if skipped:
                self.recorder.note(item.step, f"step {item.step} was skipped: the loss or its gradient was not finite")
            if (times := self._pace.add(item.sec)) is not None:
                self.recorder.note(item.step, explain(times, self._pace.usual, self.device, self._others))
            if item.wanted:
                self.recorder.step(item.step, self.steps, loss=loss, lr=item.lr, grad_norm=grad_norm, sec=item.sec,
                                   vram=self._memory("allocated"), vram_peak=self._memory("peak"),
                                   ram=self._process.memory_info().rss)
            self._gather(item, seen)

    def _gather(self, item: _Pending, seen: Sequence[float]) -> None:
        """Add a step's samples to what is known of them; every so many steps it is written down."""
        if self.samples is None or not self.samples.every:
            return
        self.samples.add(item.items, seen[:len(item.items)], seen[len(item.items):])
        self._newest = item.step
        if item.step % self.samples.every == 0:
            self._tell_samples()

    def _tell_samples(self) -> None:
        for kind, fields in self.samples.report().items() if self.samples is not None else ():
            self.recorder.event(kind, step=self._newest, **fields)

    def _memory(self, what: str) -> int | None:
        if self.device.type != "cuda":
            return None
        peak = what == "peak"
        return torch.cuda.max_memory_allocated(self.device) if peak else torch.cuda.memory_allocated(self.device)
