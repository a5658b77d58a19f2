"""Starts one trainer for each of several GPUs, as one command: `python -m trainer --gpus 0,1 …`, or a preset that names
them in memory.device."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from trainer.detached import TRAINER
from trainer.errors import UserError
from trainer.runner import VISIBLE, gpus

POLL = 0.2  # seconds between two looks
GRACE = 60.0  # seconds that the others have to save and end, once one has ended
LOCAL = "127.0.0.1"


def choose(text: str, environment: Mapping[str, str], asked: str = "--gpus {}") -> list[str]:
    """The GPUs meant by "0,1", by the names that CUDA_VISIBLE_DEVICES takes.  Raises `UserError` for other texts, and
    for GPUs that are not there, which tells where that was `asked`."""
    asked = asked.format(text)
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise UserError(f"{asked}: give the numbers of GPUs, each once, with commas between them, such as 0,1")
    there = [name for name in gpus(environment) if name]
    if missing := [number for number in numbers if int(number) >= len(there)]:
        raise UserError(f"{asked}: there is no GPU {', '.join(missing)}; this machine has "
                        + (f"{len(there)}, numbered from 0" if there else "none")
                        + ("" if asked.startswith("--gpus") else "; --gpus chooses others, such as --gpus 0"))
    return [there[number] for number in sorted(map(int, numbers))]


def without_choice(words: Sequence[str]) -> list[str]:
    """A command line without --gpus and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--gpus" and not word.startswith("--gpus="):
            kept.append(word)
        skip = word == "--gpus"
    return kept


def environments(size: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What each of `size` processes of this machine needs to find the others, in the names that torchrun uses."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": LOCAL, "MASTER_PORT": str(port)}
    return [dict(environment) | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def launch(words: Sequence[str], chosen: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command line once for each GPU, until all have ended; the first one's exit code.

    SIGTERM and SIGINT are passed on.  When one ends, the others end by themselves, having saved; those that have not
    after a minute are ended.
    """
    own = dict(environment) | {VISIBLE: ",".join(chosen)}
    processes = [subprocess.Popen([*TRAINER, *words], env=each) for each in environments(len(chosen), own)]
    old = {number: signal.signal(number, lambda *_: _send(processes, signal.SIGTERM))
           for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _wait(processes)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    code = processes[0].returncode
    if code < 0:
        print(f"the first of the run's {len(processes)} processes was killed (signal {-code}): what it had saved is "
              "there, and --resume goes on from it", file=sys.stderr)
        return 1
    return code


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    ended_at, sent = None, 0
    while any(process.poll() is None for process in processes):
        if ended_at is None and any(process.poll() is not None for process in processes):
            ended_at = time.monotonic()
        if ended_at is not None and time.monotonic() - ended_at > GRACE * (sent + 1):
            if sent:
                _kill(processes)
            else:
                _send(processes, signal.SIGTERM)
            sent += 1
        time.sleep(POLL)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
