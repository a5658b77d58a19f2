"""A comparison made from one preset: methods × ranks × learning rates × seeds, as runs that wait in the queue."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from trainer import preset as presets
from trainer import run as runs
from trainer import speed
from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.queue import Queue
from trainer.schema import Preset

MOST = 200  # runs of a comparison
ENOUGH_SEEDS = 3
LISTED = re.compile(r"[,\s]+")
FACTOR = re.compile(r"x(\d+(?:\.\d+)?(?:e-?\d+)?)")
RATE = re.compile(r"\d*\.?\d+(?:e[+-]?\d+)?", re.IGNORECASE)
GIVEN = {"adapter.method": "--methods", "adapter.rank": "--ranks", "train.lr": "--lrs", "train.seed": "--seeds"}
SAID = {"adapter.method": "method", "adapter.rank": "rank", "train.lr": "learning rate", "train.seed": "seed"}


class Choice(NamedTuple):
    """What varies; where nothing is given, the preset's own value stands.

    A rate is a number, or "x2" for twice the method's own.
    """

    methods: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    rates: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


class Planned(NamedTuple):
    """A run that is to be queued."""

    name: str
    preset: Preset


@dataclass(frozen=True)
class Sweep:
    """A comparison before it begins."""

    name: str
    preset: str  # the name of what it was made from
    runs: list[Planned]
    seconds: float | None  # of training alone, as far as it is known
    known: int  # runs whose speed was measured before; that of the others is taken from these
    remarks: list[str]


class Comparison(NamedTuple):
    """Runs that belong together, as they were written down."""

    name: str
    made: float  # unix seconds
    preset: str
    runs: list[str]


def parse(methods: str, ranks: str, rates: str, seeds: str) -> Choice:
    """What varies, from lists as a person types them.  `UserError` for what is no number."""
    return Choice(_items(methods), tuple(_number(text, "rank") for text in _items(ranks)),
                  tuple(_rate(text) for text in _items(rates)), tuple(_number(text, "seed") for text in _items(seeds)))


def plan(workspace: Path, path: Path, choice: Choice, overrides: Sequence[str] = (), name: str | None = None) -> Sweep:
    """All runs of a comparison, each preset checked; the seeds take turns, so that all settings are early at hand.

    Raises `UserError` with all faults at once, worded as for a single run; also for names that are taken.
    """
    _refuse_twice(overrides)
    seeds = choice.seeds or (presets.load(path, overrides).train.seed,)
    rows = list(product(seeds, choice.methods or (None,), choice.ranks or (None,), choice.rates or (None,)))
    if len(rows) > MOST:
        raise UserError(f"these would be {len(rows)} runs; a comparison takes at most {MOST}")
    taken = {item.name for item in listing(workspace)}
    name = _free_name(workspace, path.stem, taken) if name is None else name
    runs.check_name(name)
    if name in taken:
        raise UserError(f"there is already a comparison called {name!r}; choose another name")
    made, faults = [], []
    for seed, method, rank, rate in rows:
        try:
            made.append(_planned(path, overrides, name, method, rank, rate, seed))
        except UserError as error:
            faults += _in_words(str(error)).splitlines()
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    _refuse_taken(workspace, made)
    return Sweep(name, path.stem, made, *_time(workspace, [one.preset for one in made]), _remarks(made))


def start(workspace: Path, sweep: Sweep) -> Comparison:
    """Write down what belongs together and put the runs into the queue; its runners are for the caller to wake."""
    comparison = Comparison(sweep.name, round(time.time(), 1), sweep.preset, [one.name for one in sweep.runs])
    path = _file(workspace, sweep.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(comparison._asdict(), indent=1).encode())
    queue = Queue(workspace)
    for one in sweep.runs:
        queue.add(one.preset, one.name)
    return comparison


def listing(workspace: Path) -> list[Comparison]:
    """All comparisons, the newest first; a file that says nothing sensible is passed over."""
    found = (_read(path) for path in (workspace / "comparisons").glob("*.json"))
    return sorted((one for one in found if one is not None), key=lambda one: -one.made)


def follow(workspace: Path, old: str, new: str) -> None:
    """A run has another name: let the comparisons that it belongs to know."""
    for one in listing(workspace):
        if old in one.runs:
            named = one._replace(runs=[new if name == old else name for name in one.runs])
            write_atomic(_file(workspace, one.name), json.dumps(named._asdict(), indent=1).encode())


def shape(sweep: Sweep) -> str:
    """ "6 runs: 3 methods × 2 seeds"."""
    counts = {word: len({of(one.preset) for one in sweep.runs}) for word, of in VARIED}
    parts = [f"{count} {word}s" for word, count in counts.items() if count > 1]
    count = len(sweep.runs)
    return f"{count} run{'s' if count > 1 else ''}" + (f": {' × '.join(parts)}" if parts else "")


def row(preset: Preset) -> tuple[str, int, float, int]:
    """What varies between the runs of a comparison: method, rank, learning rate, seed."""
    return preset.adapter.method, preset.adapter.rank, float(preset.train.lr), preset.train.seed  # type: ignore[arg-type]


VARIED: tuple[tuple[str, Callable[[Preset], Any]], ...] = (
    ("method", lambda preset: preset.adapter.method), ("rank", lambda preset: preset.adapter.rank),
    ("seed", lambda preset: preset.train.seed))


def _planned(path: Path, overrides: Sequence[str], name: str, method: str | None, rank: int | None,
             rate: str | None, seed: int) -> Planned:
    given = [f"{key}={value}" for key, value in (("adapter.method", method and f'"{method}"'), ("adapter.rank", rank),
                                                 ("train.seed", seed)) if value is not None]
    if rate is not None:
        factor = FACTOR.fullmatch(rate)
        own = presets.load(path, [*overrides, *given]) if factor else None
        given.append(f"train.lr={float(factor.group(1)) * own.train.lr:g}" if factor and own else f"train.lr={rate}")
    preset = presets.load(path, [*overrides, *given])
    chosen, at_rate = preset.adapter, "" if rate is None else f"-lr{rate}"
    return Planned(f"{name}-{chosen.method}-r{chosen.rank}{at_rate}-s{seed}", preset)


def _refuse_twice(overrides: Iterable[str]) -> None:
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key in GIVEN:
            raise UserError(f"--set {item}: give it as {GIVEN[key]}, which may also be a single value")


def _refuse_taken(workspace: Path, made: Sequence[Planned]) -> None:
    queued, names = Queue(workspace).names(), [one.name for one in made]
    for name in names:
        runs.check_name(name)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"a value is given twice: {', '.join(twice[:3])} would be made more than once")
    if taken := [name for name in names if name in queued or runs.is_taken(workspace, name)]:
        raise UserError(f"there are already runs called {', '.join(taken[:3])}{' …' if len(taken) > 3 else ''}; "
                        "choose another name for the comparison")


def _in_words(message: str) -> str:
    """A fault of a single run's `--set`, as of the list that it came from."""
    for key, word in SAID.items():
        message = re.sub(rf'--set {re.escape(key)}="?([^":]*)"?:', rf"{word} \1:", message)
    return message


def _remarks(made: Sequence[Planned]) -> list[str]:
    preset, remarks = made[0].preset, []
    if not preset.evaluate.folder and not preset.evaluate.holdout:
        remarks.append("nothing is held out, so that nothing will tell which is better: set evaluate.folder, or "
                       "evaluate.holdout")
    settings = {row(one.preset)[:3] for one in made}
    if len(settings) > 1 and len(made) / len(settings) < ENOUGH_SEEDS:
        remarks.append(f"with fewer than {ENOUGH_SEEDS} seeds the noise between seeds is not known, and a small "
                       "difference cannot be told from it")
    return remarks


def _time(workspace: Path, made: Sequence[Preset]) -> tuple[float | None, int]:
    """Seconds of all runs one after the other, and how many of them are known from earlier runs."""
    known = [speed.seconds_anywhere(workspace, preset) for preset in made]
    measured = [seconds for seconds in known if seconds is not None]
    if not measured or any(preset.train.steps is None for preset in made):
        return None, 0
    usual = sum(measured) / len(measured)
    return sum((usual if seconds is None else seconds) * (preset.train.steps or 0)
               for seconds, preset in zip(known, made)), len(measured)


def _free_name(workspace: Path, stem: str, taken: Collection[str]) -> str:
    """The first free name after the preset's; no run of another comparison begins with it."""
    name, number = runs.free_name(workspace, f"{stem}-compared", taken), 2
    while any(run.name.startswith(f"{name}-") for run in runs.list_runs(workspace)):
        name, number = runs.free_name(workspace, f"{stem}-compared-{number}", taken), number + 1
    return name


def _items(text: str) -> tuple[str, ...]:
    return tuple(item for item in LISTED.split(text.strip()) if item)


def _number(text: str, word: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text):
        raise UserError(f"{word} {text[:40]}: write whole numbers, parted by commas")
    return int(text)


def _rate(text: str) -> str:
    if not (RATE.fullmatch(text) or FACTOR.fullmatch(text)):
        raise UserError(f"learning rate {text[:40]}: write numbers such as 1e-4, or x2 for twice the method's own, "
                        "parted by commas")
    return text.lower()


def _file(workspace: Path, name: str) -> Path:
    return workspace / "comparisons" / f"{name}.json"


def _read(path: Path) -> Comparison | None:
    try:
        told = json.loads(path.read_text("utf-8"))
        names = [name for name in told["runs"] if isinstance(name, str) and runs.is_name(name)]
        return Comparison(path.stem, float(told["made"]), str(told["preset"]), names)
    except (OSError, ValueError, KeyError, TypeError):
        return None
