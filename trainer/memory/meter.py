"""How much memory a GPU has for a run, and how much the run took of it at most."""

from __future__ import annotations

from typing import Protocol

import torch

from trainer.errors import UserError

GIB = 2**30
CONTEXT = 1.0 * GIB  # what CUDA, its kernels and libraries hold beside tensors: 0.84 seen on an H200
KERNELS = 0.4 * GIB  # the part of it that comes only with the first steps


class Meter(Protocol):
    """What a probe asks of a device."""

    limit: int  # bytes that the run's tensors may take

    def restart(self) -> None:
        """From now on count anew."""

    def peak(self) -> int:
        """The most bytes that tensors took since then."""


def available(device: torch.device, budget_gb: float) -> int:
    """Bytes that a run's tensors may take on a GPU: what nobody else holds of it, and within the budget (0: none).

    Raises `UserError` when that is next to nothing.
    """
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    room = int(min(free - KERNELS, budget_gb * GIB - CONTEXT if budget_gb else total))
    if room < KERNELS:
        raise UserError(f"only {free / GIB:.1f} of {total / GIB:.1f} GiB of GPU memory are free"
                        + (f", and memory.budget_gb = {budget_gb:g} leaves {max(room, 0) / GIB:.1f} of them"
                           if budget_gb else "") + ": close other programs that use the GPU, or raise the budget")
    return room


class GpuMeter:
    """A GPU's memory, of which this process gets no more than its limit.

    torch keeps the limit itself: beyond it an allocation fails, and the run steps down.  Without it the driver of
    Windows would move memory to the computer's own instead, which costs many times the step and tells nobody.
    """

    def __init__(self, device: torch.device, budget_gb: float) -> None:
        self.device, self.limit = device, available(device, budget_gb)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit / total), device)

    def restart(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def meter_of(device: torch.device, budget_gb: float) -> Meter | None:
    """The meter of a device; None for one whose memory is not counted, such as a CPU."""
    return GpuMeter(device, budget_gb) if device.type == "cuda" else None
