"""The numbers that settings are compared by, a row a setting, with the words for what is significant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from trainer import comparison, facts
from trainer.comparison import Finding, Interval, Setting
from trainer.facts import Facts
from trainer.record import clock
from trainer.wording import number, size


class Measure(NamedTuple):
    """A column: of a run, and as text."""

    key: str
    label: str
    of: Callable[[Facts], float | None]
    text: Callable[[float], str]
    judged: str = ""  # the measure of findings about it


class Cell(NamedTuple):
    """The mean over a setting's seeds as text, how sure it is ("" when nobody knows), and the verdict in words."""

    value: float | None
    text: str
    spread: str = ""
    verdict: str = ""
    kind: str = ""  # best, worse, noise, unknown: of the verdict


@dataclass(frozen=True)
class Row:
    """A setting in the table."""

    name: str
    runs: list[str]
    states: list[str]
    cells: dict[str, Cell]


class Point(NamedTuple):
    """A setting in a Pareto plot: lower is better on both axes."""

    name: str
    x: float
    y: float
    is_front: bool


def _of(event: str, key: str) -> Callable[[Facts], float | None]:
    def find(known: Facts) -> float | None:
        value = (getattr(known, event) or {}).get(key)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return find


def _file(known: Facts) -> float | None:
    result = facts.result_of(known)
    return result.bytes if result else None


def _short(digits: int) -> Callable[[float], str]:
    return lambda value: number(value, digits)


MEASURES = (
    Measure("validation", "Validation loss", _of("validation", "loss"), _short(4), "validation loss"),
    Measure("kid", "KID ×10³", _of("distance", "kid"), _short(3), "KID"),
    Measure("fd", "FD", _of("distance", "fd"), _short(4)),
    Measure("rank", "Effective rank", facts.mean_rank, _short(3)),
    Measure("sec", "s/it", lambda known: known.overview.sec, _short(3)),
    Measure("memory", "Peak memory", lambda known: known.peak_vram or known.peak_ram, size),
    Measure("file", "File", _file, size),
    Measure("time", "Time", lambda known: known.trained_sec, clock),
)
BY_KEY = {measure.key: measure for measure in MEASURES}
QUALITY = ("kid", "validation")  # what a Pareto plot shows, the first that is known of two settings or more


def table(runs: Sequence[Facts], findings: Sequence[Finding]) -> list[Row]:
    """A row a setting, in the order of the runs."""
    return [Row(setting.name, [one.overview.name for one in setting.runs], [one.overview.text for one in setting.runs],
                {measure.key: _cell(setting, measure, findings) for measure in MEASURES})
            for setting in comparison.named(runs)]


def pareto(rows: Sequence[Row], cost: str) -> tuple[str, list[Point]]:
    """Quality against a cost ("time", "memory"): the key of the quality, and a point for each setting that has both."""
    for quality in QUALITY:
        known = [(row.name, row.cells[cost].value, row.cells[quality].value) for row in rows
                 if row.cells[cost].value is not None and row.cells[quality].value is not None]
        if len(known) > 1:
            is_front = comparison.front([(x, y) for _, x, y in known])  # type: ignore[misc]
            return quality, [Point(name, x, y, best) for (name, x, y), best in zip(known, is_front)]  # type: ignore
    return "", []


def as_plain(row: Row) -> dict[str, Any]:
    """A row for JSON."""
    return {"name": row.name, "runs": row.runs, "states": row.states,
            "cells": {key: list(cell) for key, cell in row.cells.items()}}


def _cell(setting: Setting, measure: Measure, findings: Sequence[Finding]) -> Cell:
    values = [value for one in _counted(setting) if (value := measure.of(one)) is not None]
    if not values:
        return Cell(None, "–")
    mean = fmean(values)
    return Cell(mean, measure.text(mean), _spread(setting, measure, values), *_verdict(setting, measure, findings))


def _counted(setting: Setting) -> list[Facts]:
    """The runs that stand for a setting: those that are over, where any is; of one seed the later one in the list."""
    over = [one for one in setting.runs if one.overview.state in comparison.OVER]
    return list({one.preset["train"]["seed"]: one for one in over or setting.runs}.values())


def _spread(setting: Setting, measure: Measure, values: Sequence[float]) -> str:
    """"± 0.01 (3 seeds)": of several runs the 95 % interval of their mean, of one KID its own."""
    if not measure.judged:
        return ""
    if len(values) > 1 and stdev(values) > 0:
        interval: Interval = comparison.paired(values)
        return f"± {number(interval.high - interval.mean, 2)} ({len(values)} seeds)"
    event = _counted(setting)[0].distance or {}
    low, high = event.get("kid_low"), event.get("kid_high")
    if measure.key == "kid" and isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return f"{number(low, 3)} to {number(high, 3)}"
    return ""


def _verdict(setting: Setting, measure: Measure, findings: Sequence[Finding]) -> tuple[str, str]:
    ours = [one for one in findings if one.measure == measure.judged and setting.name in (one.best, one.other)]
    higher = next((one for one in ours if one.other == setting.name), None)
    if higher is not None:
        return {"significant": (f"higher than {higher.best}", "worse"), "noise": ("no difference shown", "noise"),
                "unknown": ("cannot be told yet", "unknown"),
                "not comparable": ("not comparable", "unknown")}[higher.verdict]
    return ("lowest", "best") if ours else ("", "")
