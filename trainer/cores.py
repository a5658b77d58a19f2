"""How many cores this process may use, which is not how many the machine has: bound processes, containers."""

from __future__ import annotations

import os
from pathlib import Path

# For the environment, before torch is loaded: a thread that waits for another one sleeps. It would spin otherwise, and
# where the other waits for a core that a third program uses, steps took ten times as long.
WAIT = "OMP_WAIT_POLICY", "PASSIVE"
CONTROL_GROUP = Path("/sys/fs/cgroup")  # of a container: its own


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
