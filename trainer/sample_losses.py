"""Gathers single samples' losses: by noise level, and by image, so that the ones that are hard to learn have names."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

LEVELS = 10  # equal parts of the way from clean to pure noise
MEMORY = 1000  # samples that a level's running mean goes back


class SampleLosses:
    """The plain losses of the samples since the last report: as the loss weighs pixels (masks), but not samples.

    Weights of timesteps are left out, since they would hide what the levels differ in.  Regularisation images are left
    out: they show what should stay as it is, so that their loss is no sign of what was learned, and no measure for
    the other images.
    """

    def __init__(self, files: Sequence[str | None], timesteps: int, every: int) -> None:
        """files: of each item, None for one that does not count; timesteps: their number, the last is pure noise;
        every: steps between two reports, 0 for none."""
        self.files, self.timesteps, self.every = files, timesteps, every
        self._running = [[0.0, 0.0] for _ in range(LEVELS)]  # sum and number of each level, older samples fading out
        self._clear()

    def add(self, items: Sequence[int], losses: Sequence[float], timesteps: Sequence[float]) -> None:
        """The samples of a step; those whose loss is not finite were not learned from, and do not count."""
        for item, loss, timestep in zip(items, losses, timesteps, strict=True):
            file = self.files[item]
            if file is None or not math.isfinite(loss):
                continue
            level = max(0, min(LEVELS - 1, int(LEVELS * timestep / self.timesteps)))
            for place in (self._levels[level], self._images[file][level]):
                place[0] += loss
                place[1] += 1

    def report(self) -> dict[str, dict[str, Any]]:
        """The fields of the events `timesteps` and `image_loss` for what came since the last report; empty for nothing.
        """
        if not self._images:
            return {}
        for running, (total, count) in zip(self._running, self._levels):
            fade = min(1.0, MEMORY / (running[1] + count)) if running[1] + count else 1.0
            running[:] = [fade * (running[0] + total), fade * (running[1] + count)]
        told = {"timesteps": {"loss": [round(total / count, 6) if count else None for total, count in self._levels],
                              "count": [int(count) for _, count in self._levels]},
                "image_loss": {"images": {file: self._of_image(levels) for file, levels in self._images.items()}}}
        self._clear()
        return told

    def _of_image(self, levels: list[list[float]]) -> list[float]:
        """How often an image was seen, and how its loss compares with the running means of the same noise levels."""
        seen = int(sum(count for _, count in levels))
        ratios = (total * running[1] / running[0] if running[0] > 0 else count
                  for (total, count), running in zip(levels, self._running) if count)
        return [seen, round(sum(ratios) / seen, 3)]

    def _clear(self) -> None:
        self._levels = [[0.0, 0.0] for _ in range(LEVELS)]
        self._images: dict[str, list[list[float]]] = defaultdict(lambda: [[0.0, 0.0] for _ in range(LEVELS)])
