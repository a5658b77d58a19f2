"""Brings a step's numbers from the device without making the loop wait for it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from trainer.record import Recorder

LAG = 2  # steps that an event may come late


@dataclass
class _Pending:
    step: int
    lr: float
    wanted: bool  # whether the step gets an event
    sec: float
    numbers: Tensor  # loss, grad_norm, skipped: on the host, perhaps not there yet
    arrived: torch.cuda.Event | None


class Readback:
    """Holds the last few steps' numbers until they have arrived, then has them recorded."""

    def __init__(self, recorder: Recorder, steps: int, device: torch.device, every: int) -> None:
        self.recorder, self.steps, self.device, self.every = recorder, steps, device, every
        self.bad_in_row = 0  # non-finite steps, as far as is known
        self._pending: deque[_Pending] = deque()
        self._began = time.perf_counter()
        self._process = psutil.Process()

    def push(self, step: int, loss: Tensor, grad_norm: Tensor, skipped: Tensor, lr: float) -> None:
        """Take a step's numbers, all scalars on the device; `skipped` is 1 for a non-finite step."""
        numbers = torch.stack([loss.float(), grad_norm.float(), skipped.float()])
        arrived = None
        if self.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        now = time.perf_counter()
        wanted = step % self.every == 0 or step == self.steps
        self._pending.append(_Pending(step, lr, wanted, now - self._began, numbers, arrived))
        self._began = now
        self._report(LAG if arrived is not None else 0)

    def drain(self) -> None:
        """Record everything that is still on its way."""
        self._report(0)

    def restart_clock(self) -> None:
        """Leave out of a step's time what was done between steps (pictures, checkpoints)."""
        self._began = time.perf_counter()

    def _report(self, keep: int) -> None:
        while len(self._pending) > keep:
            item = self._pending.popleft()
            if item.arrived is not None:
                item.arrived.synchronize()
            loss, grad_norm, skipped = item.numbers.tolist()
            self.bad_in_row = self.bad_in_row + 1 if skipped else 0
            if skipped:
                self.recorder.note(item.step, f"step {item.step} was skipped: the loss or its gradient was not finite")
            if item.wanted:
                self.recorder.step(item.step, self.steps, loss=loss, lr=item.lr, grad_norm=grad_norm, sec=item.sec,
                                   vram=self._memory("allocated"), vram_peak=self._memory("peak"),
                                   ram=self._process.memory_info().rss)

    def _memory(self, what: str) -> int | None:
        if self.device.type != "cuda":
            return None
        peak = what == "peak"
        return torch.cuda.max_memory_allocated(self.device) if peak else torch.cuda.memory_allocated(self.device)
