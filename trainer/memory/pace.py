"""Notices when steps become slow for good, and says what is likely to blame."""

from __future__ import annotations

import sys
from collections import deque
from statistics import median

import torch

from trainer.memory.meter import GIB

COLD = 3  # first steps that are slower: libraries load, graphs are captured
WARM = 20  # the next steps, whose median is the pace to hold
LAST = 20  # how long a slow-down must last
SLOW = 1.7  # times the pace
CROWDED = 0.05  # of the GPU's memory free: there the driver of Windows begins to move tensors out
GREW = 0.5 * GIB  # that others took since the beginning


class Pace:
    """Step times of a run, in seconds, as they come; `add` tells a lasting slow-down once."""

    def __init__(self) -> None:
        self.warm: list[float] = []
        self.last: deque[float] = deque(maxlen=LAST)
        self.seen, self.told = 0, False

    def add(self, seconds: float) -> float | None:
        """How many times slower than at first the last steps were, when that is worth telling."""
        self.seen += 1
        if self.seen <= COLD or self.told:
            return None
        if len(self.warm) < WARM:
            self.warm.append(seconds)
            return None
        self.last.append(seconds)
        if len(self.last) < LAST or median(self.last) < SLOW * self.usual:
            return None
        self.told = True
        return median(self.last) / self.usual

    @property
    def usual(self) -> float:
        """Seconds a step of the first, warm steps."""
        return median(self.warm)


def others_hold(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process's tensors do not take: other programs', and CUDA's own."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def likely_cause(free: int, total: int, grew: int, platform: str = sys.platform) -> str:
    """Why steps may have become slow. free, total: bytes of the GPU; grew: what others took of it since the start."""
    room = f"{free / GIB:.1f} of {total / GIB:.1f} GiB of GPU memory are free"
    if grew > GREW:
        return (f"{room}, and other programs took {grew / GIB:.1f} GiB since the run began: likely they use the GPU "
                "too. Close them")
    if platform == "win32" and free < CROWDED * total:
        return (f"{room}: likely the driver moves memory to the computer's own, which is slow. Set memory.budget_gb "
                "to less than the GPU has, or close other programs")
    return f"{room}: likely another program computes on this GPU, or it is hot and slows itself down"


def explain(times: float, before: float, device: torch.device, held_at_start: int) -> str:
    """A slow-down in words; `before` in seconds a step."""
    text = f"Steps take {times * before:.2f} s now, {times:.1f} times as long as at first ({before:.2f} s)"
    if device.type != "cuda":
        return f"{text}. Likely another program keeps the processor busy"
    free, total = torch.cuda.mem_get_info(device)
    return f"{text}. {likely_cause(free, total, others_hold(device) - held_at_start)}"
