"""Names the images of a run that are hardest to learn, with the course of each: read on as the run goes on."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from app.columns import as_dict, as_list, number, short, step_of
from trainer.events import Event, EventReader, rewind
from trainer.run import Run

MOST = 30  # images that are told
KEPT = 8  # runs in memory
PARTS = 20  # of an image's course, as many as its small picture shows
HISTORY = 64  # pieces of an image's course in memory
HARDER = 1.005  # the lowest ratio that is shown as more than 1
DOUBT = 3.0  # looks of an ordinary image that are added to each, so that one unlucky look is not the worst


class Hard(NamedTuple):
    """One image: how often it was seen, how hard it was (1: like the others), and how hard in each part of the run."""

    file: str
    times: int
    ratio: float
    course: list[float | None]


def _joined(first: tuple[int, int, float, int], second: tuple[int, int, float, int]) -> tuple[int, int, float, int]:
    return second[0], first[1] + second[1], first[2] + second[2], first[3] + second[3]


@dataclass
class _Image:
    times: int = 0
    total: float = 0.0  # of ratios, one a look
    span: int = 1  # events that a full piece holds; it doubles when there are too many pieces
    pieces: list[tuple[int, int, float, int]] = field(default_factory=list)  # last step, looks, total of ratios, events

    def add(self, step: int, times: int, ratio: float) -> None:
        self.times += times
        self.total += times * ratio
        piece = (step, times, times * ratio, 1)
        if self.pieces and self.pieces[-1][3] < self.span:
            self.pieces[-1] = _joined(self.pieces[-1], piece)
        else:
            self.pieces.append(piece)
        if len(self.pieces) > HISTORY:
            self.span *= 2
            self.pieces = [_joined(*self.pieces[at : at + 2]) for at in range(0, HISTORY, 2)] + self.pieces[HISTORY:]

    @property
    def ratio(self) -> float:
        return self.total / self.times

    def course(self, last: int) -> list[float | None]:
        """The mean ratio in each part of the steps so far; None where it was not seen."""
        looks, totals = [0] * PARTS, [0.0] * PARTS
        for step, times, total, _ in self.pieces:
            part = min(PARTS - 1, max(0, (step - 1) * PARTS // max(1, last)))
            looks[part] += times
            totals[part] += total
        return [short(round(total / times, 2)) if times else None for times, total in zip(looks, totals)]


class _Losses:
    """What one run's `image_loss` events say, up to where its file was read."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._begin()

    def _begin(self) -> None:
        self._reader = EventReader(self._run.events, kinds=("image_loss", "start"))
        self.images: dict[str, _Image] = {}
        self.last = 0

    def read_on(self) -> None:
        """Take what is new; a run that was resumed at an earlier step is read from its beginning."""
        before = self._reader.offset
        came = self._reader.read()
        is_back = any(event["kind"] == "start" and step_of(event) < self.last for event in came)
        if is_back or self._reader.offset < before:
            self._begin()
            came = self._reader.read()
        for event in rewind(came):
            self._take(event)

    def _take(self, event: Event) -> None:
        step = step_of(event)
        for file, told in as_dict(event.get("images")).items():
            times, ratio = (as_list(told) + [None, None])[:2]
            known = number(ratio)
            if isinstance(times, int) and times > 0 and known is not None:
                self.images.setdefault(file, _Image()).add(step, times, known)
                self.last = max(self.last, step)


class Hardest:
    """The losses by image of the runs that are looked at."""

    def __init__(self) -> None:
        self._runs: dict[str, _Losses] = {}
        self._lock = threading.Lock()

    def of(self, run: Run, most: int) -> tuple[list[Hard], int, int]:
        """Those harder than the usual image, the hardest first; how many these are, and how many were measured.

        Images that were seen few times count for less.
        """
        with self._lock:
            losses = self._runs.pop(run.name, None) or _Losses(run)
            self._runs[run.name] = losses  # the last one used is the last in order
            while len(self._runs) > KEPT:
                del self._runs[next(iter(self._runs))]
            losses.read_on()
            harder = [(file, image) for file, image in losses.images.items() if image.ratio >= HARDER]
            ordered = sorted(harder, key=lambda item: (-_doubted(item[1]), item[0]))[:min(most, MOST)]
            rows = [Hard(file, image.times, short(image.ratio), image.course(losses.last)) for file, image in ordered]
            return rows, len(harder), len(losses.images)


def _doubted(image: _Image) -> float:
    return (image.total + DOUBT) / (image.times + DOUBT)
