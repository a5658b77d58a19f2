"""Measures cases one after the other, each in a process of its own."""

from __future__ import annotations

import argparse
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

AHEAD = 3  # processes that start while one measures: their imports take as long as a row
Measure = Callable[[Any, argparse.Namespace], dict[str, Any]]


def run_apart(cases: Sequence[Any], options: argparse.Namespace, measure: Measure) -> Iterator[dict[str, Any]]:
    """A row for each case (a dataclass with a name), within `options.limit` seconds; a fault is a row too.

    A closed iterator ends what has been started.
    """
    context, todo, waiting = multiprocessing.get_context("spawn"), deque(cases), deque()
    try:
        while todo or waiting:
            while todo and len(waiting) <= AHEAD:
                here, there = context.Pipe()
                process = context.Process(target=_child, args=(todo[0], options, measure, there), daemon=True)
                process.start()
                there.close()
                waiting.append((todo.popleft(), process, here))
            yield _row(*waiting.popleft(), options.limit)
    finally:
        for _, process, _ in waiting:
            process.kill()


def _row(case: Any, process: BaseProcess, pipe: Connection, limit: float) -> dict[str, Any]:
    row = asdict(case) | {"name": case.name}
    try:
        pipe.send("begin")
        row = pipe.recv() if pipe.poll(limit) else row | {"error": f"over {limit} s"}
    except (EOFError, OSError):
        row |= {"error": "the process died"}
    process.join(0 if "error" in row else 5)
    if process.is_alive():
        process.kill()
        process.join()
    return row


def _child(case: Any, options: argparse.Namespace, measure: Measure, pipe: Connection) -> None:
    try:
        pipe.recv()  # EOFError: nobody waits any more
    except EOFError:
        return
    try:
        row = measure(case, options)
    except Exception as error:  # told in the row; the other cases go on
        import traceback

        traceback.print_exc()
        row = asdict(case) | {"name": case.name, "error": f"{type(error).__name__}: {error}"[:300]}
    pipe.send(row)
