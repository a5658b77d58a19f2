"""Cases are measured in processes of their own, in their order, and every fault is a row."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from tests.bench.apart import run_apart


@dataclass(frozen=True)
class Case:
    name: str


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    if case.name == "wrong":
        raise ValueError("no such thing")
    if case.name == "dies":
        os._exit(3)
    if case.name == "slow":
        time.sleep(60)
    return {"name": case.name, "process": os.getpid()}


def test_rows_come_in_order_each_from_its_own_process_and_faults_are_told() -> None:
    cases = [Case(name) for name in ("one", "wrong", "dies", "two", "slow", "three")]
    rows = list(run_apart(cases, argparse.Namespace(limit=8), measure))
    assert [row["name"] for row in rows] == [case.name for case in cases]
    assert [row.get("error") for row in rows] == [
        None, "ValueError: no such thing", "the process died", None, "over 8 s", None]
    assert len({row["process"] for row in rows if "process" in row} | {os.getpid()}) == 4


def test_what_was_started_ahead_ends_with_the_reader() -> None:
    with closing(run_apart([Case(str(number)) for number in range(9)], argparse.Namespace(limit=10), measure)) as rows:
        assert next(rows)["name"] == "0"
        assert multiprocessing.active_children()
    ends = time.monotonic() + 10
    while multiprocessing.active_children():
        assert time.monotonic() < ends
