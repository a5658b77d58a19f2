"""Makes columns of a run's events for the browser, thinned out where there are more than a screen can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trainer.events import Event

Columns = dict[str, Any]
MOST_ROWS = 2000  # of one kind in the first answer
MOST_SLICES = 200  # steps of the heat map, and of the loss by noise level
MOST_BLOCKS = 256
BINS = 10  # of the loss by noise level
DIGITS = 5  # more than a screen can show, and half the bytes


def columns(events: Sequence[Event], keys: Sequence[str]) -> Columns:
    """Rows as columns; an empty dict when there are no rows."""
    return {key: [short(event.get(key)) for event in events] for key in keys} if events else {}


def step_columns(events: Sequence[Event], thin: bool) -> Columns:
    """step, loss and lr; when thinned out also the mean loss that each row stands for, and how many rows that is."""
    if not thin or len(events) <= MOST_ROWS:
        return columns(events, ("step", "loss", "lr"))
    rows = thin_out(events, MOST_ROWS)
    return columns([event for event, _, _ in rows], ("step", "loss", "lr")) | {
        "mean": [short(mean) for _, mean, _ in rows], "n": [count for _, _, count in rows]}


def thin_out(events: Sequence[Event], most: int) -> list[tuple[Event, float | None, int]]:
    """Smallest and largest loss of each bucket of steps, so that every peak stays, with the bucket's mean."""
    size = math.ceil(len(events) / (most // 2))
    rows: list[tuple[Event, float | None, int]] = []
    for start in range(0, len(events), size):
        bucket = events[start : start + size]
        known = [event for event in bucket if number(event.get("loss")) is not None]
        if not known:
            rows.append((bucket[0], None, len(bucket)))
            continue
        mean = sum(event["loss"] for event in known) / len(known)
        low, high = (pick(known, key=lambda event: event["loss"]) for pick in (min, max))
        if low is high:
            rows.append((low, mean, len(bucket)))
            continue
        first, second = sorted((low, high), key=step_of)
        rows += [(first, mean, len(bucket) - len(bucket) // 2), (second, mean, len(bucket) // 2)]
    return rows


def validation_columns(events: Sequence[Event], thin: bool) -> Columns:
    """step and loss, and the loss at each of the fixed noise levels, by the level's place (0: the least noise)."""
    kept = every_nth(events, thin, MOST_ROWS)
    made = columns(kept, ("step", "loss"))
    levels = max((len(as_list(event.get("by_quantile"))) for event in kept), default=0)
    if levels:
        made["levels"] = {str(level): [_item(event.get("by_quantile"), level) for event in kept]
                          for level in range(min(levels, 64))}
    return made


def rank_columns(events: Sequence[Event], thin: bool) -> Columns:
    """Effective rank by layer group, the rank itself, and how far the factors are from orthonormal."""
    kept = every_nth(events, thin, MOST_ROWS)
    if not kept:
        return {}
    groups = {str(group) for event in kept for group in as_dict(event.get("erank"))}
    return columns(kept, ("step", "rank", "orth_error")) | {
        name: {group: [short(as_dict(event.get(name)).get(group)) for event in kept] for group in sorted(groups)}
        for name in ("erank", "stable")}


def block_columns(events: Sequence[Event], thin: bool) -> Columns:
    """Effective rank of each block of the model, in the model's order; a run of an older trainer has none."""
    kept = every_nth([event for event in events if as_dict(event.get("blocks"))], thin, MOST_SLICES)
    if not kept:
        return {}
    names = list(dict.fromkeys(str(name) for event in kept for name in event["blocks"]))[:MOST_BLOCKS]
    return columns(kept, ("step", "rank")) | {
        "erank": {name: [_item(event["blocks"].get(name), 0) for event in kept] for name in names}}


def bin_columns(events: Sequence[Event], thin: bool) -> Columns:
    """Loss and number of samples in each of ten noise levels; neighbours are put together when thinned out."""
    rows = [row for event in events if (row := _bins(event))]
    size = math.ceil(len(rows) / MOST_SLICES) if thin else 1
    merged = [_together(rows[start : start + size]) for start in range(0, len(rows), max(1, size))]
    return dict(zip(("step", "loss", "count"), map(list, zip(*merged)))) if merged else {}


def every_nth(events: Sequence[Event], thin: bool, most: int) -> Sequence[Event]:
    """At most so many of them in a first answer; the newest always."""
    stride = math.ceil(len(events) / most) if thin else 1
    return events if stride <= 1 else events[::-1][::stride][::-1]


def step_of(event: Event) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def short(value: Any) -> Any:
    """A number as few digits as a screen needs; what JSON has no word for is None."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _item(values: Any, place: int) -> float | None:
    """One number of a list that may be shorter, or no list."""
    listed = as_list(values)
    return short(number(listed[place])) if place < len(listed) else None


def _bins(event: Event) -> tuple[int, list[float | None], list[int]] | None:
    loss, count = as_list(event.get("loss")), as_list(event.get("count"))
    if len(loss) != BINS or len(count) != BINS:
        return None
    counts = [how_many if isinstance(how_many, int) and how_many > 0 else 0 for how_many in count]
    return step_of(event), [number(value) if many else None for value, many in zip(loss, counts)], counts


def _together(rows: Sequence[tuple[int, list[float | None], list[int]]]) -> tuple[int, list[float | None], list[int]]:
    """One row for many: means over all their samples, at the newest of their steps."""
    sums, counts = [0.0] * BINS, [0] * BINS
    for _, loss, count in rows:
        for place, (value, many) in enumerate(zip(loss, count)):
            if value is not None:
                sums[place] += value * many
                counts[place] += many
    return rows[-1][0], [short(total / many) if many else None for total, many in zip(sums, counts)], counts
