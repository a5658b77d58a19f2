"""Which device and arithmetic to use, and whose turn it is: one GPU, many runs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from trainer.cores import usable
from trainer.errors import UserError

POLL = 0.5  # seconds between two tries
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def turn(workspace: Path, device: torch.device, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold `workspace/gpu-<id>.lock` until the block ends; `on_wait` is called while another run holds it.

    The id is the card's own: its number differs between processes that see other cards (CUDA_VISIBLE_DEVICES).
    A CPU is shared as it is.  The system frees the lock of a process that is killed.
    """
    if device.type != "cuda":
        yield
        return
    lock = FileLock(workspace / f"gpu-{identity(device)}.lock")
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            on_wait()
            time.sleep(POLL)
    try:
        yield
    finally:
        lock.release()


def identity(device: torch.device) -> str:
    """What a GPU is known by to every process: its UUID, or its number where torch has none."""
    if not torch.cuda.is_available():
        return str(device.index or 0)
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device.index or 0))


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def pick_device(name: str, setting: str) -> torch.device:
    """The device of that name; accelerate decides for "auto".  `UserError` for one that is not there."""
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise UserError(f"{setting} = {name!r}: torch sees {torch.cuda.device_count()} CUDA GPUs here; "
                            "choose another, or 'auto'")
        return torch.device("cuda", index)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{setting} = 'mps': torch sees no Apple GPU here; choose another, or 'auto'")
    if name != "auto":
        return torch.device(name)
    from accelerate import PartialState  # late: it is slow to import

    found = PartialState().device
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found  # many calls want its number


def choose_arithmetic(precision: str, deterministic: bool) -> None:
    """Let torch compute as `train.precision` and `train.deterministic` ask.

    By itself it rounds fp32 to TF32's 10 bits in convolutions: who asks for fp32 has chosen otherwise.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.conv.fp32_precision = "ieee" if precision == "fp32" else "tf32"


def use_cores(sharing: int) -> None:
    """Let torch compute with as many threads as there are cores for this process, one of `sharing` on its machine.

    torch counts the machine's cores, also in a container that may use two of them; never more than it would use.
    """
    torch.set_num_threads(max(1, min(torch.get_num_threads(), usable() // sharing)))


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of a frozen model: as chosen, else bf16 on GPUs that have it, fp16 on older ones, fp32 on a CPU."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
