"""The GPUs of this machine, as the driver tells them: the app never loads torch."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from typing import Any

QUERY = ("--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")
HOLDS = 300.0  # seconds
PATIENCE = 20.0  # seconds for the driver's tool, which is slow when it starts the driver

_known: tuple[float, list[dict[str, Any]]] = (-HOLDS, [])
_lock = threading.Lock()


def cards() -> list[dict[str, Any]]:
    """Number, name and GiB of each GPU; none on a machine without NVIDIA's driver."""
    global _known
    with _lock:
        if time.monotonic() - _known[0] >= HOLDS:
            _known = time.monotonic(), _ask()
        return _known[1]


def _ask() -> list[dict[str, Any]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        told = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse(told.stdout) if told.returncode == 0 else []


def parse(text: str) -> list[dict[str, Any]]:
    """The driver's table: a line for each GPU, "0, NVIDIA GeForce RTX 4090, 24564" (MiB)."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[0].isdecimal():
            gib = round(int(parts[2]) / 1024) if parts[2].isdecimal() else None
            found.append({"index": int(parts[0]), "name": parts[1], "gib": gib})
    return found
