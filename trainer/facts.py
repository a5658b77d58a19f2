"""What is known of runs, read from their folders: in short for a list, in full to look at one or to compare several."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from trainer import preset as presets
from trainer import schema
from trainer.errors import UserError
from trainer.events import Event, EventReader, devices, first_event, newest_events, rewind
from trainer.run import Run, list_runs, open_run
from trainer.schema import Preset

RECENT = 50  # step events that the shown loss and time are taken from
MOST_NOTES = 20
LENGTHS = ("steps", "epochs")


@dataclass(frozen=True)
class Overview:
    """A run in a list.  Times are unix seconds; `loss` and `sec` (of a step) are of the newest step events."""

    name: str
    state: str  # the word
    text: str  # for a person
    step: int
    steps: int
    loss: float | None
    sec: float | None
    method: str
    started: float


@dataclass(frozen=True)
class Export:
    """A LoRA file that a run wrote and that is still there."""

    file: str  # relative to the run
    step: int
    bytes: int
    format: str
    worst_rel_error: float | None
    dtype: str = ""
    unmatched: int = 0  # keys that match nothing in the model
    readers: tuple[str, ...] = ()  # programs that read all of it
    others: tuple[str, ...] = ()  # what the other programs make of it


@dataclass(frozen=True)
class Facts:
    """All that is known of one run.  What was never measured is None, or empty."""

    overview: Overview
    path: str
    preset: dict[str, dict[str, Any]]  # by section and key
    like: str  # the shipped preset, or "the defaults", that the run's preset is nearest to
    differences: dict[str, list[Any]]  # section.key: [there, here]
    device: str
    first_validation: Event | None
    validation: Event | None  # the newest
    best_validation: Event | None
    distance: Event | None
    rank: Event | None
    peak_vram: int | None  # bytes
    peak_ram: int | None
    trained_sec: float | None
    checkpoints: list[int]
    exports: list[Export]
    skipped: dict[str, str]  # file: reason
    notes: list[str]
    data: Event | None = None  # what it was trained on: images, held_out, sha256
    versions: dict[str, str] = field(default_factory=dict)  # of the programs it was trained with, at its last start
    hardware: str = ""  # the device alone
    best: Event | None = None  # which checkpoint is the best, and why
    origin: dict[str, Any] | None = None  # of a branch: run and step

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def find_run(workspace: Path, text: str) -> Run:
    """The run meant by a name, or by a folder's path.  `UserError` with the nearest name when there is none."""
    if (workspace / "runs" / text / "preset.toml").is_file() and "/" not in text:
        return Run((workspace / "runs" / text).resolve())
    if (Path(text) / "preset.toml").is_file():
        return open_run(Path(text))
    names = [run.name for run in list_runs(workspace)]
    if not names:
        raise UserError(f"there is no run called {text!r}: {workspace / 'runs'} has none yet; name another --workspace "
                        "if yours are elsewhere")
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"the newest are: {', '.join(names[:5])}"
    raise UserError(f"there is no run called {text!r} in {workspace / 'runs'}; {hint}")


def overview(run: Run) -> Overview:
    """A run in short: its event file is not read whole, so that hundreds of runs are listed at once."""
    state = run.state()
    try:
        first, newest = first_event(run.events) or {}, newest_events(run.events, "step")
    except OSError:  # the state says so
        first, newest = {}, []
    steps = [event for event in rewind(newest) if event["kind"] == "step"][-RECENT:]
    return Overview(run.name, state.word, state.text, state.step, state.steps, _mean(steps, "loss"),
                    _median(steps, "sec"), _method(run.preset), _number(first.get("t")) or run.preset.stat().st_mtime)


def best_of(run: Run) -> Event | None:
    """Which checkpoint is the best, as its `best` event; None when nothing was measured, or can be read."""
    try:
        bests = rewind(EventReader(run.events, kinds=("start", "best")).read())
    except OSError:
        return None
    return _last([event for event in bests if event["kind"] == "best"])


def collect(run: Run) -> Facts:
    """All facts of a run; reads its event file whole (about 20 ms for 10,000 steps)."""
    preset = presets.load(run.preset)
    by_kind: dict[str, list[Event]] = {}
    for event in rewind(EventReader(run.events).read()):
        by_kind.setdefault(str(event["kind"]), []).append(event)
    like, differences = _nearest_preset(preset)
    steps, validations = by_kind.get("step", []), by_kind.get("validation", [])
    measured = [event for event in validations if _number(event.get("loss")) is not None]
    skipped = {str(event.get("file")): str(event.get("reason")) for event in by_kind.get("skipped", [])}
    return Facts(
        overview(run), str(run.path), _plain(preset), like, differences,
        device=_device(by_kind.get("start", [])), first_validation=_last(validations[:1]),
        validation=_last(measured), best_validation=min(measured, key=lambda event: event["loss"], default=None),
        distance=_last(by_kind.get("distance", [])), rank=_last(by_kind.get("rank", [])),
        peak_vram=_most(steps, "vram_peak"), peak_ram=_most(steps, "ram"),
        trained_sec=_number((_last(by_kind.get("end", [])) or {}).get("trained_sec")),
        checkpoints=run.checkpoint_steps(), exports=_exports(run, by_kind.get("export", [])), skipped=skipped,
        notes=[str(event.get("text", "")) for event in by_kind.get("note", [])[-MOST_NOTES:]],
        data=_last(by_kind.get("data", [])), versions=_versions(by_kind.get("start", [])),
        hardware=devices(_last(by_kind.get("start", [])) or {}),
        best=_last(by_kind.get("best", [])), origin=origin._asdict() if (origin := run.origin()) else None)


def mean_rank(facts: Facts) -> float | None:
    """The effective rank over all groups of layers, as one number to compare by."""
    groups = (facts.rank or {}).get("erank")
    values = [value for value in groups.values() if _number(value) is not None] if isinstance(groups, dict) else []
    return fmean(values) if values else None


def result_of(facts: Facts) -> Export | None:
    """The file to use: the run's own, else its newest."""
    own = [export for export in facts.exports if "/" not in export.file]
    return max(own or facts.exports, key=lambda export: export.step, default=None)


def differing(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that two presets (`Facts.preset`) differ in: section.key: [one's value, the other's]."""
    keys = {(section, key) for preset in (one, other) for section, values in preset.items() for key in values}
    pairs = {f"{section}.{key}": [one.get(section, {}).get(key), other.get(section, {}).get(key)]
             for section, key in sorted(keys)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _nearest_preset(preset: Preset) -> tuple[str, dict[str, list[Any]]]:
    """A run does not say what it was made from: of the family's shipped presets, the one with the least changes."""
    needed = {"model": {"family": preset.model.family, "base": preset.model.base},
              "data": {"folder": preset.data.folder},
              "train": {key: value for key in LENGTHS if (value := getattr(preset.train, key)) is not None}}
    bare, _ = presets.check(needed)
    found = [] if bare is None else [("the defaults", presets.complete(bare, Path()))]
    for path in sorted(presets.SHIPPED.glob("*.toml")):
        shipped = presets.load(path)
        if shipped.model.family == preset.model.family:
            found.append((path.stem, shipped))
    mine = _plain(preset)
    compared = [(name, differing(_plain(other), mine)) for name, other in found]
    return min(compared, key=lambda item: len(item[1]), default=("", {}))


def _plain(preset: Preset) -> dict[str, dict[str, Any]]:
    return {name: getattr(preset, name).model_dump(mode="json", exclude={"alpha"}) for name in schema.SECTIONS}


def _exports(run: Run, events: Sequence[Event]) -> list[Export]:
    newest = {Path(os.path.relpath(run.exported(str(event.get("path"))), run.path)).as_posix(): event
              for event in events}
    return [Export(name, int(_number(event.get("step")) or 0), (run.path / name).stat().st_size,
                   str(event.get("format", "")), _number(event.get("worst_rel_error")), str(event.get("dtype") or ""),
                   len(missing) if isinstance(missing := event.get("unmatched"), (list, dict)) else 0,
                   _texts(event.get("readers")), _texts(event.get("others")))
            for name, event in newest.items() if (run.path / name).is_file()]


def _device(starts: Sequence[Event]) -> str:
    start = _last(starts) or {}
    parts = [devices(start), f"torch {start['torch']}" if start.get("torch") else "",
             str(start.get("host", ""))]
    return ", ".join(part for part in parts if part)


def _versions(starts: Sequence[Event]) -> dict[str, str]:
    start = _last(starts) or {}
    told = start.get("versions")
    known = {str(name): str(version) for name, version in told.items()} if isinstance(told, dict) else {}
    return ({"torch": str(start["torch"])} if start.get("torch") else {}) | known


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _method(preset: Path) -> str:
    """From the bare TOML: a list shows presets of other versions, too."""
    try:
        adapter = presets.read_toml(presets.read_text(preset), preset.name).get("adapter", {})
    except UserError:
        return ""
    chosen = schema.Adapter.model_fields["method"].default
    return str(adapter.get("method", chosen)) if isinstance(adapter, dict) else ""


def _last(events: Sequence[Event]) -> Event | None:
    return events[-1] if events else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _values(events: Sequence[Event], key: str) -> list[float]:
    return [value for event in events if (value := _number(event.get(key))) is not None]


def _mean(events: Sequence[Event], key: str) -> float | None:
    values = _values(events, key)
    return fmean(values) if values else None


def _median(events: Sequence[Event], key: str) -> float | None:
    values = _values(events, key)
    return median(values) if values else None


def _most(events: Sequence[Event], key: str) -> int | None:
    return max((int(value) for value in _values(events, key)), default=None)
