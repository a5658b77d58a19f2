"""What a run measured over its steps, thinned out, and its samples: what charts and pictures are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from trainer.events import Event, EventReader, rewind
from trainer.run import Run

MOST = 300  # points of a curve
SMOOTHING = 0.98  # what stays of the past, a step
KINDS = ("start", "step", "validation", "rank", "sample")
Columns = dict[str, list[Any]]


class Shot(NamedTuple):
    """A sample that is there: of which prompt and seed, at which step (0: the base model), and its file."""

    step: int
    prompt: str
    seed: int | None
    file: str  # relative to the run


@dataclass(frozen=True)
class Curves:
    """Each curve as columns with `step`; of the loss a row stands for `n` steps with the mean `mean`."""

    loss: Columns
    validation: Columns
    rank: Columns
    shots: list[Shot]


def read(run: Run) -> Curves:
    """All of a run."""
    events = rewind([event for event in EventReader(run.events).read() if event["kind"] in KINDS])
    return of_events(run, events)


def of_events(run: Run, events: Sequence[Event]) -> Curves:
    """The curves of events, in at most `MOST` points each: means of as many steps as it takes."""
    by_kind: dict[str, list[Event]] = {}
    for event in events:
        if isinstance(event.get("step"), int):
            by_kind.setdefault(str(event["kind"]), []).append(event)
    ranks = [(event["step"], mean) for event in by_kind.get("rank", [])
             if (mean := _mean_rank(event.get("erank"))) is not None]
    measured = [(event["step"], loss) for event in by_kind.get("validation", [])
                if (loss := _number(event.get("loss"))) is not None]
    return Curves(_losses(by_kind.get("step", [])), _columns("loss", measured), _columns("mean", ranks),
                  [shot for event in by_kind.get("sample", []) for shot in _shots(run, event)])


def smooth(loss: Columns, weight: float = SMOOTHING) -> list[float]:
    """Running mean of the loss without a bias at its start; as the app's charts do it."""
    total, norm, smoothed = 0.0, 0.0, []
    for mean, count in zip(loss["mean"], loss["n"]):
        stays = weight**count
        total, norm = total * stays + mean * (1 - stays), norm * stays + (1 - stays)
        smoothed.append(total / norm)
    return smoothed


def shared_steps(shots: Sequence[Sequence[Shot]]) -> list[int]:
    """Steps at which all of several runs drew; without any, those at which one of them did."""
    drawn = [{shot.step for shot in one} for one in shots if one]
    return sorted(set.intersection(*drawn) or set.union(*drawn)) if drawn else []


def _losses(steps: Sequence[Event]) -> Columns:
    known = [(event["step"], loss) for event in steps if (loss := _number(event.get("loss"))) is not None]
    size = max(1, ceil(len(known) / MOST))
    buckets = [known[start : start + size] for start in range(0, len(known), size)]
    return {"step": [bucket[-1][0] for bucket in buckets],
            "mean": [float(f"{fmean(loss for _, loss in bucket):.5g}") for bucket in buckets],
            "n": [len(bucket) for bucket in buckets]}


def _columns(name: str, rows: Sequence[tuple[int, float]]) -> Columns:
    stride = max(1, ceil(len(rows) / MOST))
    kept = rows[::-1][::stride][::-1]  # the newest always
    return {"step": [step for step, _ in kept], name: [float(f"{value:.5g}") for _, value in kept]}


def _shots(run: Run, event: Event) -> list[Shot]:
    """The pictures of an event that lie where a run's pictures lie."""
    names, prompts = _texts(event.get("images")), _texts(event.get("prompts"))
    seed = event["seed"] if isinstance(event.get("seed"), int) else None
    return [Shot(event["step"], prompt, None if seed is None else seed + index, name)
            for index, (name, prompt) in enumerate(zip(names, prompts)) if _is_there(run, name)]


def _is_there(run: Run, name: str) -> bool:
    """Whether a name is a file in the run's samples, and leads nowhere else."""
    if set(name) & set("\0\\") or len(name) > 200:
        return False
    path, folder = run.path / name, run.path.resolve() / "samples"
    try:
        return path.resolve() == folder / Path(name).name and path.is_file()
    except (OSError, RuntimeError):
        return False


def _mean_rank(groups: Any) -> float | None:
    known = [value for value in groups.values() if _number(value) is not None] if isinstance(groups, Mapping) else []
    return fmean(known) if known else None


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    return float(value) if is_number else None
