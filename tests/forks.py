"""Trainer processes that start at once: a server has the slow imports behind it and forks one for each command line.

A trainer can be told to kill itself (SIGKILL, as no program can catch) at a chosen file operation; those that it could
be killed at from outside take so short that a test would miss them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = "accelerate", "diffusers.models.unets.unet_2d_condition", "trainer.check", "trainer.loop"


class Death(NamedTuple):
    """Die just before the `times`-th operation of a kind (as audit hooks call it) on a path that holds `part`."""

    operation: str
    part: str
    times: int = 1


class Forked:
    """One trainer."""

    def __init__(self, server: Server, pid: int) -> None:
        self.server, self.pid = server, pid

    def wait(self) -> int:
        """Its exit code; negative for the signal that ended it, as in `subprocess`."""
        return int(self.server.ask({"wait": self.pid}))

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def is_running(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().split(") ")[1][0] != "Z"


class Server:
    """Starts trainers; a context manager, so that none outlives the test."""

    def __enter__(self) -> Server:
        self._process = subprocess.Popen([sys.executable, "-m", "tests.forks"], cwd=ROOT, text=True, bufsize=1,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def start(self, *arguments: object, death: Death | None = None,
              environment: Mapping[str, str] | None = None) -> Forked:
        """environment: what the trainer finds beside the server's own."""
        return Forked(self, int(self.ask({"arguments": [str(item) for item in arguments], "death": death,
                                          "environment": dict(environment or {})})))

    def ask(self, request: dict[str, object]) -> str:
        self._process.stdin.write(json.dumps(request) + "\n")
        return self._process.stdout.readline()


def die_at(death: Death) -> None:
    left = death.times

    def hook(operation: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if operation == death.operation and any(death.part in str(item) for item in arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def serve() -> None:
    """Fork a trainer or wait for one, as the lines of stdin say."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    from trainer.__main__ import main

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        if pid := os.fork():
            print(pid, flush=True)
            continue
        os.dup2(2, 1)  # stdout speaks to the test
        os.environ.update(request["environment"])
        if request["death"]:
            die_at(Death(*request["death"]))
        os._exit(main(request["arguments"]))


if __name__ == "__main__":
    serve()
