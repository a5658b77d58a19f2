"""How many cores this process may use, which is not how many the machine has: bound processes, containers."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

import psutil

WAIT = "OMP_WAIT_POLICY"
CONTROL_GROUP = Path("/sys/fs/cgroup")  # of a container: its own
LOOK = 0.2  # seconds in which cores are watched
ONE_PROGRAM = 0.5  # cores; who uses more is in the way of a thread


def choose_waiting(environment: MutableMapping[str, str]) -> None:
    """For the environment, before torch is loaded: whether a thread that waits for another one spins or sleeps.

    To wake a thread costs: on two cores of a virtual machine, steps of the demo took 0.23 s with threads that spin and
    0.72 s with threads that sleep. Beside one busy program they took 0.88 s and 0.44 s: there a thread spins for as
    long as the other one waits for its core (`python -m tests.bench.waiting`).
    """
    if WAIT not in environment and "torch" not in sys.modules and idle() < usable() - ONE_PROGRAM:
        environment[WAIT] = "PASSIVE"


def idle() -> float:
    """How many of the machine's cores no program uses at the moment."""
    return (1 - psutil.cpu_percent(LOOK) / 100) * (psutil.cpu_count() or 1)


def usable() -> int:
    """Cores that this process is bound to, and no more than its container's quota of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = quota(CONTROL_GROUP)
    return bound if limit is None else max(1, min(bound, round(limit)))


def quota(group: Path) -> float | None:
    """A control group's quota in cores; None where there is none, as on most machines."""
    try:
        if (group / "cpu.max").exists():  # version 2: "200000 100000", or "max 100000"
            allowed, period = (group / "cpu.max").read_text().split()
        else:  # version 1, where -1 means that there is none
            allowed, period = ((group / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(allowed) / int(period) if int(allowed) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
