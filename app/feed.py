"""Follows a run's events for the browser: only what is new, as columns; the first answer thinned out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from app import words
from app.paths import inside
from trainer.errors import UserError
from trainer.events import Event, EventReader, rewind
from trainer.run import Run

Columns = dict[str, list[Any]]
MOST_ROWS = 2000  # of one kind in the first answer
MOST_NOTES = 200
DIGITS = 5  # more than a screen can show, and half the bytes
NOW = ("sec", "eta", "vram", "vram_peak", "ram", "grad_norm")
DISTANCE = ("step", "extractor", "resize", "kid", "kid_low", "kid_high", "fd", "fd_floor", "n_ref", "n_gen",
            "nn_cosine", "base_kid", "base_kid_low", "base_kid_high", "base_fd")
EXPORT = ("step", "path", "format", "dtype", "weights", "worst_rel_error", "unmatched",
          "readers", "others")


def read(run: Run, cursor: str) -> dict[str, Any]:
    """What came since `cursor` ("" at first), and the next cursor.

    `reset` says that this is the whole (the first answer, or the file is another one now); `rewind` that rows beyond
    that step no longer hold, since the run was resumed there.
    """
    inode = _inode(run.events)
    offset = _offset(cursor, inode, run.events)
    reader = EventReader(run.events, offset)
    came = [event for event in reader.read() if isinstance(event.get("step", 0), int)]
    answer: dict[str, Any] = {"cursor": f"{inode:x}-{reader.offset}"}
    starts = [_step(event) for event in came if event.get("kind") == "start"]
    if offset == 0:
        answer["reset"] = True
    elif starts:
        answer["rewind"] = min(starts)
    return answer | _sorted_by_kind(run, rewind(came), thin=offset == 0)


def _sorted_by_kind(run: Run, events: list[Event], thin: bool) -> dict[str, Any]:
    by_kind: dict[str, list[Event]] = {}
    for event in events:
        by_kind.setdefault(str(event.get("kind")), []).append(event)
    makers: dict[str, Callable[[], Any]] = {
        "steps": lambda: step_columns(by_kind.get("step", []), thin),
        "ranks": lambda: rank_columns(_every_nth(by_kind.get("rank", []), thin)),
        "validation": lambda: columns(_every_nth(by_kind.get("validation", []), thin), ("step", "loss")),
        "quantiles": lambda: _last(by_kind, "validation").get("by_quantile"),
        "distances": lambda: [_chosen(event, DISTANCE) for event in by_kind.get("distance", [])],
        "samples": lambda: [_sample(run, event) for event in by_kind.get("sample", [])],
        "exports": lambda: [_export(run, event) for event in by_kind.get("export", [])],
        "skipped": lambda: [[str(event.get("file", "")), str(event.get("reason", ""))]
                            for event in by_kind.get("skipped", [])[:MOST_NOTES]],
        "notes": lambda: words.notes(events)[-MOST_NOTES:],
        "machine": lambda: words.machine(_last(by_kind, "start")),
        "now": lambda: _chosen(_last(by_kind, "step"), NOW),
    }
    return {name: made for name, make in makers.items() if (made := make())}


def columns(events: Sequence[Event], keys: Sequence[str]) -> Columns:
    """Rows as columns; an empty dict when there are no rows."""
    return {key: [_short(event.get(key)) for event in events] for key in keys} if events else {}


def step_columns(events: Sequence[Event], thin: bool) -> Columns:
    """step, loss and lr; when thinned out also the mean loss that each row stands for, and how many rows that is."""
    if not thin or len(events) <= MOST_ROWS:
        return columns(events, ("step", "loss", "lr"))
    rows = thin_out(events, MOST_ROWS)
    return columns([event for event, _, _ in rows], ("step", "loss", "lr")) | {
        "mean": [_short(mean) for _, mean, _ in rows], "n": [count for _, _, count in rows]}


def thin_out(events: Sequence[Event], most: int) -> list[tuple[Event, float | None, int]]:
    """Smallest and largest loss of each bucket of steps, so that every peak stays, with the bucket's mean."""
    size = math.ceil(len(events) / (most // 2))
    rows: list[tuple[Event, float | None, int]] = []
    for start in range(0, len(events), size):
        bucket = events[start : start + size]
        known = [event for event in bucket if _number(event.get("loss")) is not None]
        if not known:
            rows.append((bucket[0], None, len(bucket)))
            continue
        mean = sum(event["loss"] for event in known) / len(known)
        low, high = (pick(known, key=lambda event: event["loss"]) for pick in (min, max))
        if low is high:
            rows.append((low, mean, len(bucket)))
            continue
        first, second = sorted((low, high), key=_step)
        rows += [(first, mean, len(bucket) - len(bucket) // 2), (second, mean, len(bucket) // 2)]
    return rows


def rank_columns(events: Sequence[Event]) -> dict[str, Any]:
    """Effective rank by layer group, the rank itself, and how far the factors are from orthonormal."""
    if not events:
        return {}
    groups = {str(group) for event in events for group in _dict(event.get("erank"))}
    return columns(events, ("step", "rank", "orth_error")) | {
        name: {group: [_short(_dict(event.get(name)).get(group)) for event in events] for group in sorted(groups)}
        for name in ("erank", "stable")}


def _sample(run: Run, event: Event) -> dict[str, Any]:
    """Prompts with their pictures and seeds; a picture that lies elsewhere than in the run's `samples` is left out."""
    images = [str(name) for name in _list(event.get("images"))]
    prompts = [str(prompt) for prompt in _list(event.get("prompts"))]
    seed = event.get("seed") if isinstance(event.get("seed"), int) else None
    cells = [[prompt, name, None if seed is None else seed + index]
             for index, (prompt, name) in enumerate(zip(prompts, images)) if _lies_in(run.path, name, "samples")]
    return {"step": _step(event), "cells": cells, "at": event.get("t")}


def _export(run: Run, event: Event) -> dict[str, Any]:
    chosen = _chosen(event, EXPORT)
    file = str(chosen.pop("path", ""))
    chosen["unmatched"] = words.count_of(chosen.get("unmatched"))
    for key in ("readers", "others"):
        if key in chosen:
            chosen[key] = [str(text) for text in chosen[key]] if isinstance(chosen[key], list) else []
    is_ours = file.endswith(".safetensors") and (file == run.result.name or _lies_in(run.path, file, "exports"))
    if is_ours and (run.path / file).is_file():
        chosen |= {"file": file, "bytes": (run.path / file).stat().st_size}
    return chosen


def _lies_in(folder: Path, name: str, part: str) -> bool:
    try:
        return inside(folder, name).parent == (folder / part).resolve()
    except UserError:
        return False


def _offset(cursor: str, inode: int, path: Path) -> int:
    """The byte to go on from; 0 for the first time, or when the file is not the one that the cursor means."""
    match = re.fullmatch(r"([0-9a-f]{1,16})-(\d{1,15})", cursor)
    if not match or int(match.group(1), 16) != inode or not path.exists():
        return 0
    offset = int(match.group(2))
    return offset if offset <= path.stat().st_size else 0


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _every_nth(events: list[Event], thin: bool) -> list[Event]:
    """At most `MOST_ROWS` of them in a first answer; the newest always."""
    stride = math.ceil(len(events) / MOST_ROWS) if thin else 1
    return events if stride <= 1 else events[::-1][::stride][::-1]


def _last(by_kind: dict[str, list[Event]], kind: str) -> Event:
    return by_kind[kind][-1] if by_kind.get(kind) else {}


def _chosen(event: Event, keys: Sequence[str]) -> dict[str, Any]:
    return {key: _short(event[key]) for key in keys if event.get(key) is not None}


def _step(event: Event) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
