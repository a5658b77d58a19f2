"""Follows a run's events for the browser: only what is new, as columns; the first answer thinned out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from app import columns, words
from app.columns import as_list, short, step_of
from app.paths import inside
from trainer.errors import UserError
from trainer.events import Event, EventReader, rewind
from trainer.run import Run, is_name

MOST_NOTES = 200
BEST = ("step", "by", "value", "low", "high", "why")
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
    inode = inode_of(run.events)
    offset = offset_of(cursor, inode, run.events)
    reader = EventReader(run.events, offset)
    came = [event for event in reader.read() if isinstance(event.get("step", 0), int)]
    answer: dict[str, Any] = {"cursor": f"{inode:x}-{reader.offset}"}
    starts = [step_of(event) for event in came if event.get("kind") == "start"]
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
        "steps": lambda: columns.step_columns(by_kind.get("step", []), thin),
        "ranks": lambda: columns.rank_columns(by_kind.get("rank", []), thin),
        "blocks": lambda: columns.block_columns(by_kind.get("rank", []), thin),
        "bins": lambda: columns.bin_columns(by_kind.get("timesteps", []), thin),
        "hard": lambda: [step_of(event) for event in by_kind.get("image_loss", [])[-1:]],
        "validation": lambda: columns.validation_columns(by_kind.get("validation", []), thin),
        "bests": lambda: [_chosen(event, BEST) for event in by_kind.get("best", [])][-MOST_NOTES:],
        "prompts": lambda: _prompts(_last(by_kind, "prompts")),
        "distances": lambda: [_chosen(event, DISTANCE) for event in by_kind.get("distance", [])],
        "samples": lambda: [_sample(run, event) for event in by_kind.get("sample", [])],
        "exports": lambda: [_export(run, event) for event in by_kind.get("export", [])],
        "skipped": lambda: [[str(event.get("file", "")), str(event.get("reason", ""))]
                            for event in by_kind.get("skipped", [])[:MOST_NOTES]],
        "notes": lambda: words.notes(events)[-MOST_NOTES:],
        "origin": lambda: _origin(by_kind.get("start", [])),
        "machine": lambda: words.machine(_last(by_kind, "start")),
        "now": lambda: _chosen(_last(by_kind, "step"), NOW),
    }
    return {name: made for name, make in makers.items() if (made := make())}


def _sample(run: Run, event: Event) -> dict[str, Any]:
    """Prompts with their pictures and seeds; a picture that lies elsewhere than in the run's `samples` is left out."""
    images = [str(name) for name in as_list(event.get("images"))]
    prompts = [str(prompt) for prompt in as_list(event.get("prompts"))]
    seed = event.get("seed") if isinstance(event.get("seed"), int) else None
    cells = [[prompt, name, None if seed is None else seed + index]
             for index, (prompt, name) in enumerate(zip(prompts, images)) if _lies_in(run.path, name, "samples")]
    return {"step": step_of(event), "cells": cells, "at": event.get("t")}


def _origin(starts: list[Event]) -> list[Any] | None:
    """The run and the step from which a branch began."""
    source = starts[0].get("from") if starts else None
    name = source.get("run") if isinstance(source, dict) else None
    return [name, step_of(source)] if isinstance(name, str) and is_name(name) else None


def _prompts(event: Event) -> list[str]:
    """Prompts that were changed while it ran."""
    return [str(prompt) for prompt in as_list(event.get("prompts"))]


def _export(run: Run, event: Event) -> dict[str, Any]:
    chosen = _chosen(event, EXPORT)
    file = _file_of(run, str(chosen.pop("path", "")))
    chosen["unmatched"] = words.count_of(chosen.get("unmatched"))
    for key in ("readers", "others"):
        if key in chosen:
            chosen[key] = [str(text) for text in chosen[key]] if isinstance(chosen[key], list) else []
    if file:
        chosen |= {"file": file, "bytes": (run.path / file).stat().st_size}
    return chosen


def _file_of(run: Run, said: str) -> str:
    """The present file of an export, relative to the run, which may have another name by now; "" for none of ours."""
    try:
        path = run.exported(said)
        name = path.relative_to(run.path).as_posix()
    except ValueError:
        return ""
    is_ours = name == run.result.name or (name.endswith(".safetensors") and _lies_in(run.path, name, "exports"))
    return name if is_ours and path.is_file() else ""


def _lies_in(folder: Path, name: str, part: str) -> bool:
    try:
        return inside(folder, name).parent == (folder / part).resolve()
    except UserError:
        return False


def offset_of(cursor: str, inode: int, path: Path) -> int:
    """The byte to go on from; 0 for the first time, or when the file is not the one that the cursor means."""
    match = re.fullmatch(r"([0-9a-f]{1,16})-(\d{1,15})", cursor)
    if not match or int(match.group(1), 16) != inode or not path.exists():
        return 0
    offset = int(match.group(2))
    return offset if offset <= path.stat().st_size else 0


def inode_of(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _last(by_kind: dict[str, list[Event]], kind: str) -> Event:
    return by_kind[kind][-1] if by_kind.get(kind) else {}


def _chosen(event: Event, keys: Sequence[str]) -> dict[str, Any]:
    return {key: short(event[key]) for key in keys if event.get(key) is not None}
