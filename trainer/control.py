"""What the outside asks of a running trainer: files in `control/`, SIGTERM and SIGINT."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from trainer.run import Run


class Stopped(Exception):
    """Somebody asked the run to stop while it prepared or finished."""


class Requests:
    """Requests to one run.  SIGTERM and SIGINT mean stop, as the file does; a second SIGINT ends at once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._stop = self._interrupted = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def stop_asked(self) -> bool:
        """Whether to end after this step; once asked, it stays so."""
        if not self._stop and self.run.take("stop") is not None:
            self._stop = True
        return self._stop

    def guard(self) -> None:
        """Raise `Stopped` inside long work when a stop was asked for."""
        if self.stop_asked():
            raise Stopped

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._stop = True
