"""Compares runs: which differences count, and which are noise of seeds or of few pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal

from trainer.events import Event
from trainer.facts import Facts

# Two-sided 95 % points of Student's t for 1, 2, … degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL_95 = 1.96
SEEDS = {("train", "seed"), ("sample", "seed")}
MEASURED_WITH = {  # what must be the same before two numbers may be compared at all
    "validation": (("model", ("family", "base")), ("data", ("resolution",)),
                   ("evaluate", ("folder", "holdout", "images", "quantiles"))),
    "distance": (("model", ("family", "base")), ("data", ("resolution",)), ("evaluate", ("folder", "holdout")),
                 ("sample", ("steps", "guidance", "negative", "width", "height"))),
}
COUNTED = ("extractor", "resize", "n_ref", "n_gen")

Verdict = Literal["significant", "noise", "unknown", "not comparable"]


@dataclass(frozen=True)
class Finding:
    """One sentence on two settings (`best` has the lower mean), and what it rests on; low and high bound 95 %."""

    measure: Literal["validation loss", "KID"]
    best: str
    other: str
    verdict: Verdict
    why: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def settings(runs: Sequence[Facts]) -> list[list[Facts]]:
    """Runs by setting: those that differ in nothing but the seed stand together."""
    groups: dict[str, list[Facts]] = {}
    for facts in runs:
        chosen = {section: {key: value for key, value in values.items() if (section, key) not in SEEDS}
                  for section, values in facts.preset.items() if section not in ("output", "log")}
        groups.setdefault(json.dumps(chosen, sort_keys=True), []).append(facts)
    return list(groups.values())


def compare(runs: Sequence[Facts]) -> list[Finding]:
    """The best setting by validation loss, and by KID, against each other one."""
    groups = settings(runs)
    return [*_by_validation(groups), *_by_kid(groups)]


def _by_validation(groups: Sequence[list[Facts]]) -> list[Finding]:
    """Paired by seed: two runs of one seed saw the same images, noise and held-out noise."""
    measured = [group for group in groups if any(facts.validation for facts in group)]
    if len(measured) < 2:
        return []
    best, *others = sorted(measured, key=lambda group: fmean(_losses(group).values()))
    return [_paired(best, other) for other in others]


def _paired(best: list[Facts], other: list[Facts]) -> Finding:
    def found(verdict: Verdict, why: str, *numbers: float) -> Finding:
        return Finding("validation loss", _name(best), _name(other), verdict, why, *numbers)

    if reason := _other_ground(best[0], other[0], "validation"):
        return found("not comparable", reason)
    mine, its = _losses(best), _losses(other)
    shared = sorted(mine.keys() & its.keys())
    if not shared:
        return found("unknown", "no seed was used for both; train both with the same seeds")
    gaps = [its[seed] - mine[seed] for seed in shared]
    gap = fmean(gaps)
    if len(shared) == 1:
        return found("unknown", "one seed tells nothing of the noise between seeds; train both with two more", gap)
    reach = _t_95(len(gaps) - 1) * stdev(gaps) / sqrt(len(gaps))
    verdict: Verdict = "significant" if gap - reach > 0 or gap + reach < 0 else "noise"
    return found(verdict, f"{len(shared)} paired seeds", gap, gap - reach, gap + reach)


def _by_kid(groups: Sequence[list[Facts]]) -> list[Finding]:
    """By the intervals that each run has; of several seeds, by the one in the middle."""
    measured = [middle for group in groups if (middle := _middle(group)) is not None]
    if len(measured) < 2:
        return []
    best, *others = sorted(measured, key=lambda facts: facts.distance["kid"])  # type: ignore[index]
    return [_intervals(best, other) for other in others]


def _intervals(best: Facts, other: Facts) -> Finding:
    mine, its = best.distance or {}, other.distance or {}
    names = best.overview.name, other.overview.name
    if reason := _other_ground(best, other, "distance") or _other_count(mine, its):
        return Finding("KID", *names, "not comparable", reason)
    gap = its["kid"] - mine["kid"]
    # Both runs are held against the same reference, whose share of the noise cancels: the interval is too wide
    reach = NORMAL_95 * sqrt(sum(((item["kid_high"] - item["kid_low"]) / (2 * NORMAL_95)) ** 2 for item in (mine, its)))
    verdict: Verdict = "significant" if gap > reach else "noise"
    return Finding("KID", *names, verdict, f"{mine.get('n_gen')} pictures each", gap, gap - reach, gap + reach)


def _other_ground(one: Facts, other: Facts, measure: str) -> str:
    """Why two numbers mean different things; "" when they mean the same."""
    changed = [f"{section}.{key}" for section, keys in MEASURED_WITH[measure] for key in keys
               if one.preset[section].get(key) != other.preset[section].get(key)]
    return f"measured with another {', '.join(changed)}" if changed else ""


def _other_count(one: Event, other: Event) -> str:
    changed = [key for key in COUNTED if one.get(key) != other.get(key)]
    return f"measured with another {', '.join(changed)}" if changed else ""


def _middle(group: list[Facts]) -> Facts | None:
    """The run of a setting whose KID is the median of its seeds'."""
    known = [facts for facts in group if all(isinstance((facts.distance or {}).get(key), (int, float))
                                             for key in ("kid", "kid_low", "kid_high"))]
    known.sort(key=lambda facts: facts.distance["kid"])  # type: ignore[index]
    return known[(len(known) - 1) // 2] if known else None


def _losses(group: list[Facts]) -> dict[int, float]:
    """Validation loss by seed; of runs with the same seed, the later one's in the list."""
    return {facts.preset["train"]["seed"]: facts.validation["loss"] for facts in group if facts.validation}


def _name(group: list[Facts]) -> str:
    return " + ".join(facts.overview.name for facts in group)


def _t_95(freedom: int) -> float:
    return T_95[freedom - 1] if freedom <= len(T_95) else NORMAL_95 + 2.4 / freedom
