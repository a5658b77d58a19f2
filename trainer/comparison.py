"""Compares runs: which differences count, and which are noise of seeds or of few pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal, NamedTuple

from trainer import student
from trainer.events import Event
from trainer.facts import Facts, differing

CONFIDENCE = 0.95
ENOUGH_SEEDS = 3  # shared ones, from which KID is judged by pairs: they hold the noise between seeds too
SWEPT = re.compile(r".+-(lora|stiefel|stella|trilora)-r\d+(-lr.+)?-s\d+")  # the name of a run of a sweep
TOLD = {"adapter.method", "adapter.rank", "train.lr", "train.optimizer", "train.momentum"}  # by a setting's name
SEEDS = {("train", "seed"), ("sample", "seed")}
MEASURED_WITH = {  # what must be the same before two numbers may be compared at all
    "validation": (("model", ("family", "base")), ("data", ("resolution",)),
                   ("evaluate", ("folder", "holdout", "images", "quantiles"))),
    "distance": (("model", ("family", "base")), ("data", ("resolution",)), ("evaluate", ("folder", "holdout")),
                 ("sample", ("steps", "guidance", "negative", "width", "height"))),
}
OVER = ("done", "early")  # states of runs whose numbers are their last
COUNTED = ("extractor", "resize", "n_ref", "n_gen")

Measured = Literal["validation loss", "KID"]
Verdict = Literal["significant", "noise", "unknown", "not comparable"]


@dataclass(frozen=True)
class Finding:
    """One sentence on two settings (`best` has the lower mean), and what it rests on.

    low and high bound the difference; with several findings of a measure, all of them hold at once with 95 %.
    """

    measure: Measured
    best: str
    other: str
    verdict: Verdict
    why: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


class Setting(NamedTuple):
    """Runs that differ in nothing but the seed, under a name to tell them from the others by."""

    name: str
    runs: list[Facts]


def settings(runs: Sequence[Facts]) -> list[list[Facts]]:
    """Runs by setting: those that differ in nothing but the seed stand together."""
    groups: dict[str, list[Facts]] = {}
    for facts in runs:
        chosen = {section: {key: value for key, value in values.items() if (section, key) not in SEEDS}
                  for section, values in facts.preset.items() if section not in ("output", "log")}
        groups.setdefault(json.dumps(chosen, sort_keys=True), []).append(facts)
    return list(groups.values())


def named(runs: Sequence[Facts]) -> list[Setting]:
    """The settings with their names: what sets each apart from the others, or the names of its runs."""
    groups = settings(runs)
    changed = {name for group in groups[1:] for name in differing(groups[0][0].preset, group[0].preset)}
    is_planned = any(len(group) > 1 for group in groups) or all(SWEPT.fullmatch(one.overview.name) for one in runs)
    names = [" + ".join(one.overview.name for one in group) for group in groups]
    if is_planned and changed <= TOLD:
        rates = {(group[0].preset["adapter"]["method"], group[0].preset["train"]["lr"]) for group in groups}
        told = changed if len(rates) > len({method for method, _ in rates}) else changed - {"train.lr"}
        short = [_told(group[0], told) for group in groups]
        names = short if all(short) and len(set(short)) == len(short) else names
    return [Setting(name, group) for name, group in zip(names, groups)]


def paired(gaps: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of differences between pairs, and Student's interval of it; two or more."""
    reach = student.quantile(confidence, len(gaps) - 1) * stdev(gaps) / sqrt(len(gaps))
    return Interval(fmean(gaps), fmean(gaps) - reach, fmean(gaps) + reach)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats in both numbers (lower is better): the Pareto front."""
    return [not any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)
            for point in points]


def compare(runs: Sequence[Facts]) -> list[Finding]:
    """The best setting by validation loss, and by KID, against each other one.

    Of several settings the best one may be so by luck: each interval is as wide as the number of comparisons asks for
    (Bonferroni), which is enough for comparisons with the best (Hsu 1984).
    """
    groups = named(runs)
    return [*_by_validation(groups), *_by_kid(groups)]


def _by_validation(groups: Sequence[Setting]) -> list[Finding]:
    """Paired by seed: two runs of one seed saw the same images, noise and held-out noise."""
    known = {group.name: _of_seeds(group, "validation", "loss") for group in groups}
    measured = [group for group in groups if known[group.name]]
    if len(measured) < 2:
        return []
    best, *others = sorted(measured, key=lambda group: fmean(known[group.name].values()))
    return [_by_pairs("validation loss", best, other, known[best.name], known[other.name], len(others))
            for other in others]


def _by_kid(groups: Sequence[Setting]) -> list[Finding]:
    """By pairs where three seeds or more are shared; else by the intervals of the runs in the middle."""
    known = {group.name: _of_seeds(group, "distance", "kid") for group in groups}
    measured = [group for group in groups if known[group.name] and _middle(group.runs)]
    if len(measured) < 2:
        return []
    best, *others = sorted(measured, key=lambda group: fmean(known[group.name].values()))
    return [_by_pairs("KID", best, other, known[best.name], known[other.name], len(others))
            if len(known[best.name].keys() & known[other.name].keys()) >= ENOUGH_SEEDS
            else _by_intervals(best, other, len(others)) for other in others]


def _by_pairs(measure: Measured, best: Setting, other: Setting, mine: Mapping[int, float], its: Mapping[int, float],
              comparisons: int) -> Finding:
    def found(verdict: Verdict, why: str, *numbers: float) -> Finding:
        if numbers and numbers[0] < 0:  # the seeds that both have say otherwise than all seeds of each
            gap, *bounds = (-number for number in numbers)
            return Finding(measure, other.name, best.name, verdict, why, gap, *reversed(bounds))
        return Finding(measure, best.name, other.name, verdict, why, *numbers)

    kind = "validation" if measure == "validation loss" else "distance"
    one, another = best.runs[0], other.runs[0]
    if reason := _other_ground(one, another, kind) or _other_counts(best, other, kind):
        return found("not comparable", reason)
    if going := _unfinished([*best.runs, *other.runs], kind):
        return found("unknown", going)
    shared = sorted(mine.keys() & its.keys())
    if not shared:
        return found("unknown", "no seed was used for both; train both with the same seeds")
    gaps = [its[seed] - mine[seed] for seed in shared]
    if len(shared) == 1:
        return found("unknown", "one seed tells nothing of the noise between seeds; train both with two more",
                     fmean(gaps))
    gap, low, high = paired(gaps, _confidence(comparisons))
    verdict: Verdict = "significant" if low > 0 or high < 0 else "noise"
    return found(verdict, f"{len(shared)} paired seeds{_jointly(comparisons)}", gap, low, high)


def _by_intervals(best: Setting, other: Setting, comparisons: int) -> Finding:
    one, another = sorted((_middle(best.runs), _middle(other.runs)), key=_kid)  # type: ignore[arg-type]
    name = {id(facts): group.name for group in (best, other) for facts in group.runs}
    mine, its, names = one.distance or {}, another.distance or {}, (name[id(one)], name[id(another)])
    if reason := _other_ground(one, another, "distance") or _other_count(mine, its):
        return Finding("KID", *names, "not comparable", reason)
    if going := _unfinished([one, another], "distance"):
        return Finding("KID", *names, "unknown", going)
    gap, wide = its["kid"] - mine["kid"], NormalDist().inv_cdf
    # Both runs are held against the same reference, whose share of the noise cancels: the interval is too wide
    spread = sqrt(sum(((item["kid_high"] - item["kid_low"]) / (2 * wide((1 + CONFIDENCE) / 2))) ** 2
                      for item in (mine, its)))
    reach = wide((1 + _confidence(comparisons)) / 2) * spread
    verdict: Verdict = "significant" if gap > reach else "noise"
    return Finding("KID", *names, verdict, f"{mine.get('n_gen')} pictures each{_jointly(comparisons)}", gap,
                   gap - reach, gap + reach)


def _confidence(comparisons: int) -> float:
    """Of one interval, so that all of them hold at once with 95 %."""
    return 1 - (1 - CONFIDENCE) / comparisons


def _jointly(comparisons: int) -> str:
    return f", one of {comparisons} comparisons" if comparisons > 1 else ""


def _unfinished(runs: Sequence[Facts], kind: str) -> str:
    """Why numbers of runs that are still going are not to be held against each other."""
    steps = {(getattr(facts, kind) or {}).get("step") for facts in runs}
    is_over = all(facts.overview.state in OVER for facts in runs)
    return "" if is_over or len(steps) == 1 else "not all of their runs are done, so that they stand at other steps"


def _other_ground(one: Facts, other: Facts, measure: str) -> str:
    """Why two numbers mean different things; "" when they mean the same."""
    changed = [f"{section}.{key}" for section, keys in MEASURED_WITH[measure] for key in keys
               if one.preset[section].get(key) != other.preset[section].get(key)]
    return f"measured with another {', '.join(changed)}" if changed else ""


def _other_counts(best: Setting, other: Setting, kind: str) -> str:
    """The same of each run's distance."""
    if kind != "distance":
        return ""
    events = [facts.distance for facts in (*best.runs, *other.runs) if facts.distance]
    return next((reason for event in events[1:] if (reason := _other_count(events[0], event))), "")


def _other_count(one: Event, other: Event) -> str:
    changed = [key for key in COUNTED if one.get(key) != other.get(key)]
    return f"measured with another {', '.join(changed)}" if changed else ""


def _middle(group: list[Facts]) -> Facts | None:
    """The run of a setting whose KID is the median of its seeds'."""
    known = [facts for facts in group if all(isinstance((facts.distance or {}).get(key), (int, float))
                                             for key in ("kid", "kid_low", "kid_high"))]
    known.sort(key=_kid)
    return known[(len(known) - 1) // 2] if known else None


def _kid(facts: Facts) -> float:
    return (facts.distance or {})["kid"]


def _of_seeds(group: Setting, kind: str, key: str) -> dict[int, float]:
    """A number by seed; of runs with the same seed, the later one's in the list."""
    events = {facts.preset["train"]["seed"]: getattr(facts, kind) or {} for facts in group.runs}
    return {seed: event[key] for seed, event in events.items() if isinstance(event.get(key), (int, float))}


def _told(facts: Facts, changed: set[str]) -> str:
    """ "stella, rank 16": what sets a setting apart."""
    chosen = facts.preset
    parts = {"adapter.method": str(chosen["adapter"]["method"]), "adapter.rank": f"rank {chosen['adapter']['rank']}",
             "train.lr": f"learning rate {chosen['train']['lr']:g}"}
    return ", ".join(text for name, text in parts.items() if name in changed)
