"""Append-only JSON lines: one writer puts down what a run does, any number of readers follow it."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]  # t (unix seconds), kind, and what belongs to the kind; readers pass over what they do not know
LAST_TIME = 32_503_680_000  # the year 3000, in unix seconds: the latest that every system makes a date of
BLOCK = 1 << 16  # bytes that are read at a time from a file's end

# The kinds of a run's events. Steps count from the run's beginning; what was never measured is null or left out.
# start         v, step, steps, pid, host, device, torch, versions, preset_sha; of a branch also from: {run, step}
# phase         name, done, of, detail: how far a long preparation is
# data          images, held_out, sha256: what is trained on
# skipped       file, reason: an image that is left out
# step          step, steps, loss, lr, grad_norm, sec, vram, vram_peak, ram, eta
# timesteps     step, loss: [10], count: [10]: mean plain loss of the samples since the last one, by noise level from
#               clean to pure noise; regularisation images are left out
# image_loss    step, images: {file: [n, ratio]}: how often each was seen since the last one, and its loss over that of
#               all images at the same noise levels
# rank          step, rank, orth_error; by group of layers: erank, stable, norm, drift; by block, in the model's order:
#               blocks: {block: [erank, stable, norm]}, spectrum: {block: first 16 singular values over the largest}
# validation    step, loss, by_quantile: of the held-out images
# distance      step, extractor, resize, kid, kid_low, kid_high, fd, fd_floor, n_ref, n_gen, nn_cosine, base_kid, ...
# best          step, by ("validation" or "kid"), value, low, high, why: the best checkpoint; the last one holds
# checkpoint    step, path, bytes, sec
# export        step, path, format, weights, dtype, bytes, worst_rel_error, unmatched, zero, readers, others
# sample        step, images, prompts, seed, weights, asked, sec
# prompts       step, prompts: the ones that are drawn from now on
# note          step, text: what a person should read
# paused, resumed  step, text
# end           step, reason ("done", "early", "stopped" or "error"), trained_sec; text (why early), error


class EventWriter:
    """The only writer of a run's `events.jsonl`: one `write()` a line, so that a reader never sees half of two.

    Opening heals the file: a last line torn by a kill is cut off.  Numbers that JSON has no word for (NaN,
    infinities) are written as null.  Lines are not fsynced: only checkpoints are (a power cut may cost the
    last lines, never a checkpoint).
    """

    def __init__(self, path: Path) -> None:
        heal(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; `t` is unix time in seconds, now if it is not among the fields.  Raises `OSError` when the
        disk is full."""
        event = {"t": round(time.time(), 3), "kind": kind, **fields}
        text = json.dumps(_finite(event), ensure_ascii=False, separators=(",", ":"))
        line = text.encode(errors="replace") + b"\n"  # file names may hold what is not UTF-8
        written = self._file.write(line)
        if written < len(line):  # a full disk; half a line would spoil the next one too
            os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        self._file.close()


class EventReader:
    """Follows an event file from a byte offset, whole lines only; a file cut or replaced is read again.

    With `kinds`, events of others are passed over without being read, which takes a twentieth of the time.
    """

    def __init__(self, path: Path, offset: int = 0, kinds: Collection[str] = ()) -> None:
        self.path, self.offset = path, offset
        self._kinds = tuple(kinds)
        self._marks = [json.dumps(kind).encode() for kind in kinds]
        self._inode: int | None = None

    def read(self) -> list[Event]:
        """The events that came since the last call; an unreadable line is passed over."""
        try:
            with open(self.path, "rb") as file:
                facts = os.fstat(file.fileno())
                size = facts.st_size
                if size < self.offset or self._inode not in (None, facts.st_ino):
                    self.offset = 0
                self._inode = facts.st_ino
                file.seek(self.offset)
                chunk = file.read(size - self.offset)
        except FileNotFoundError:
            return []
        end = chunk.rfind(b"\n") + 1
        self.offset += end
        return list(self._wanted(chunk[:end]))

    def _wanted(self, block: bytes) -> Iterator[Event]:
        if not self._kinds:
            return _parse(block)
        likely = b"\n".join(line for line in block.splitlines() if any(mark in line for mark in self._marks))
        return (event for event in _parse(likely) if event["kind"] in self._kinds)


def devices(start: Event) -> str:
    """What a run runs on, by its `start` event: "NVIDIA L4", or "2 × NVIDIA L4"."""
    name, count = str(start.get("device", "")), start.get("processes")
    return f"{count} × {name}" if isinstance(count, int) and count > 1 and name else name


def heal(path: Path) -> None:
    """Cut a torn last line (a writer was killed inside its `write`)."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while size - len(tail) > 0 and b"\n" not in tail:
            start = max(0, size - len(tail) - 65536)
            file.seek(start)
            tail = file.read(size - len(tail) - start) + tail
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def last_event(path: Path) -> Event | None:
    """The newest whole event, from the file's end."""
    return next(newest_first(path), None)


def newest_first(path: Path) -> Iterator[Event]:
    """The events from the file's end on; no more of it is read than is asked for."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        return
    with file:
        end, rest, is_whole = file.seek(0, os.SEEK_END), b"", False
        while end > 0:
            start = max(0, end - BLOCK)
            file.seek(start)
            block = file.read(end - start) + rest
            if not is_whole:  # the last line may be torn
                whole = block[: block.rfind(b"\n") + 1]
                is_whole = bool(whole)
                block = whole or block
            first = block.find(b"\n") + 1 if start > 0 and is_whole else 0
            rest, end = (block[:first] if is_whole else block), start
            if is_whole:
                for line in reversed(block[first:].splitlines()):
                    yield from _parse(line)


def first_event(path: Path) -> Event | None:
    """The oldest event, from the file's first line."""
    try:
        with open(path, "rb") as file:
            return next(_parse(file.readline()), None)
    except FileNotFoundError:
        return None


def newest_events(path: Path, *kinds: str) -> list[Event]:
    """The events in the last 64 kB of the file; in more of it until one of these kinds is among them, as events that
    tell of many images are long."""
    try:
        length = path.stat().st_size
    except OSError:
        return []
    size = 1 << 16
    while True:
        events = EventReader(path, max(0, length - size)).read()
        if size >= length or not kinds or any(event["kind"] in kinds for event in events):
            return events
        size *= 8


def rewind(events: list[Event]) -> list[Event]:
    """What still holds: a `start` at step k voids every earlier event of a later step."""
    kept: list[Event] = []
    for event in events:
        if event.get("kind") == "start":
            step = _step(event)
            kept = [old for old in kept if _step(old) <= step]
        kept.append(event)
    return kept


def _step(event: Event) -> float:
    """An event's step; 0 for one that has none, or says it wrongly."""
    step = event.get("step", 0)
    return step if isinstance(step, (int, float)) else 0


def _parse(block: bytes) -> Iterator[Event]:
    for line in block.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and "kind" in event:
            if not _is_time(event.get("t")):
                event.pop("t", None)
            yield event


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LAST_TIME


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
