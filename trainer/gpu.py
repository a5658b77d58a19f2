"""One GPU, many runs: a run waits here until the one before it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

POLL = 0.5  # seconds between two tries


@contextmanager
def turn(workspace: Path, device: torch.device, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold `workspace/gpu<n>.lock` until the block ends; `on_wait` is called while another run holds it.

    A CPU is shared as it is.  The system frees the lock of a process that is killed.
    """
    if device.type != "cuda":
        yield
        return
    lock = FileLock(workspace / f"gpu{device.index or 0}.lock")
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
