"""Puts down what a run does: events for the app, TensorBoard files, and a line for the person at the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from trainer.errors import NO_ROOM
from trainer.events import EventWriter
from trainer.run import Run
from trainer.tensorboard import TensorBoardWriter

PHASE_INTERVAL = 1.0  # seconds between two events of one phase
WAIT_INTERVAL = 60.0  # and of one that counts nothing, such as waiting: only to show that the run lives
LINE_INTERVAL = 10.0  # seconds between two lines where no terminal redraws one


class Recorder:
    """Writes events (always), TensorBoard files (by choice) and a progress line."""

    writes = True

    def __init__(self, run: Run, *, tensorboard: bool, terminal: TextIO | None = None) -> None:
        self.run, self.terminal = run, terminal
        self._events = EventWriter(run.events)
        self._waiting: deque[tuple[str, dict[str, Any]]] = deque()
        self._board = TensorBoardWriter(run.tensorboard, run.last_step() + 1) if tensorboard else None
        self._phase_at, self._phase = 0.0, ""
        self._line_at = 0.0
        self._seconds: deque[float] = deque(maxlen=50)

    def event(self, kind: str, **fields: Any) -> None:
        """An event as it is; `trainer.events` lists the kinds.

        On a full disk it waits until one finds room again, and training goes on.
        """
        self._waiting.append((kind, {"t": round(time.time(), 3), **fields}))
        try:
            while self._waiting:
                kind, fields = self._waiting[0]
                self._events.write(kind, **fields)
                self._waiting.popleft()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise

    def note(self, step: int, text: str) -> None:
        """Something that a person should read."""
        self.event("note", step=step, text=text)
        self.say(f"note: {text}")

    def phase(self, name: str, done: int = 0, of: int = 0, detail: str = "") -> None:
        """How far a long preparation is; at most one event a second, but the first and last always.

        `detail` says it in words where the two numbers are not for people, as those of bytes are not.
        """
        now = time.monotonic()
        interval = WAIT_INTERVAL if of == 0 else PHASE_INTERVAL if done < of else 0.0
        if name == self._phase and now - self._phase_at < interval:
            return
        new, self._phase, self._phase_at = name != self._phase, name, now
        self.event("phase", name=name, done=done, of=of, **({"detail": detail} if detail else {}))
        if self.terminal is not None and self.terminal.isatty():
            self._redraw(f"{name}: {detail}" if detail else f"{name} {done}/{of}" if of else name)
        elif new:
            self.say(name)

    def step(self, step: int, steps: int, *, loss: float, lr: float, grad_norm: float, sec: float,
             vram: int | None, vram_peak: int | None, ram: int) -> None:
        """One optimizer step; `sec` of wall time, memory of the GPU and of this process in bytes."""
        self._seconds.append(sec)
        eta = median(self._seconds) * (steps - step)
        self.event("step", step=step, steps=steps, loss=loss, lr=lr, grad_norm=grad_norm, sec=round(sec, 4), vram=vram,
                   vram_peak=vram_peak, ram=ram, eta=round(eta, 1))
        self.scalars(step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm})
        memory = f"  {(vram_peak or ram) / 2**30:.1f} GiB"
        line = f"step {step}/{steps}  loss {loss:.4f}  {median(self._seconds):.2f} s/it  ETA {clock(eta)}{memory}"
        if self.terminal is not None and self.terminal.isatty():
            self._redraw(line)
        elif time.monotonic() - self._line_at > LINE_INTERVAL or step == steps:
            self._line_at = time.monotonic()
            self.say(line)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers for TensorBoard only."""
        if self._board is not None:
            for tag, value in values.items():
                self._board.scalar(tag, value, step)

    def image(self, tag: str, path: Path, width: int, height: int, step: int) -> None:
        if self._board is not None:
            self._board.image(tag, path.read_bytes(), width, height, step)

    def say(self, text: str) -> None:
        """A line of its own, on the terminal or in the log, where there is room for it."""
        stream = self.terminal or sys.stdout
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)  # a file's name must not end a run
        if stream.isatty():
            stream.write("\r\x1b[K")
        with suppress(OSError):  # a full disk
            stream.write(text + "\n")
            stream.flush()

    def close(self) -> None:
        self._events.close()
        if self._board is not None:
            self._board.close()

    def seconds_per_step(self) -> float | None:
        """The median of the last steps."""
        return median(self._seconds) if self._seconds else None

    def _redraw(self, text: str) -> None:
        assert self.terminal is not None
        width = os.get_terminal_size(self.terminal.fileno()).columns or 80  # 0: a terminal that does not know
        self.terminal.write("\r\x1b[K" + text[: max(20, width - 1)])
        self.terminal.flush()


class Silent(Recorder):
    """Of a process that is not its run's first: it says nothing, since the first says it."""

    writes = False

    def __init__(self, run: Run) -> None:
        self.run, self.terminal = run, None
        self._seconds: deque[float] = deque(maxlen=50)

    def event(self, kind: str, **fields: Any) -> None: ...

    def phase(self, name: str, done: int = 0, of: int = 0, detail: str = "") -> None: ...

    def step(self, step: int, steps: int, **numbers: Any) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, tag: str, path: Path, width: int, height: int, step: int) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def with_rate(recorder: Recorder, name: str, things: str) -> Callable[[int, int], None]:
    """Tells how far a phase is, and how many of these things a second it takes, counted from its first call."""
    began: tuple[float, int] | None = None

    def tell(done: int, of: int) -> None:
        nonlocal began
        began = began or (time.monotonic(), done)
        rate = (done - began[1]) / max(time.monotonic() - began[0], 1e-9)
        recorder.phase(name, done, of, f"{done} of {of}, {rate:.3g} {things}/s" if done > began[1] else "")

    return tell


def clock(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
