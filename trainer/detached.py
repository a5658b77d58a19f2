"""Processes that live on when the one that started them ends, is killed, or loses its terminal."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent  # where `-m trainer` is found
TRAINER = (sys.executable, "-m", "trainer")
LAST_LINES = 12  # of a process that died early


@dataclass(frozen=True)
class Launch:
    """A process that this one started."""

    process: subprocess.Popen[bytes]
    log: Path
    at: float  # unix seconds

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        """What it said on its way out, without a log's earlier lines."""
        text = self.log.read_text(encoding="utf-8", errors="replace").strip() if self.log.exists() else ""
        lines = text.splitlines()[-LAST_LINES:]
        return "\n".join(lines) or f"the process ended at once with code {self.process.returncode} and said nothing"


def start_detached(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Launch:
    """A process of its own, with its output in a file: a pipe or a shared terminal would take it down with us.

    environment: as a whole; None is this process's own.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    new_session = sys.platform != "win32"
    # on Windows a console that nobody sees: without any, the interpreter behind a venv's python.exe opens one
    flags = 0 if new_session else subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    at = time.time()
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=HOME, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=new_session, creationflags=flags,
                                   env=environment)
    return Launch(process, log, at)
