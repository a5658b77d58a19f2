"""Takes runs from the queue, one after the other: one runner a GPU, each a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from trainer import preset as presets
from trainer import run as runs
from trainer.detached import Launch, start_detached
from trainer.errors import UserError
from trainer.events import EventReader
from trainer.queue import Entry, Queue
from trainer.run import Run

POLL = 0.3  # seconds between two looks at a run that another process trains
MOST_TRIES = 3  # of a run that dies without getting any further
BEGINNING = 60.0  # seconds that a new run's trainer may take until it holds its run
VISIBLE = "CUDA_VISIBLE_DEVICES"

Say = Callable[[str], object]


def gpus(environment: Mapping[str, str]) -> list[str]:
    """A name for each GPU, as CUDA_VISIBLE_DEVICES takes it; [""] for a machine without."""
    if chosen := [part.strip() for part in environment.get(VISIBLE, "").split(",") if part.strip()]:
        return chosen
    program = shutil.which("nvidia-smi")
    if program is None or environment.get(VISIBLE) == "":
        return [""]
    try:
        told = subprocess.run([program, "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True,
                              timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return [""]
    return [line.strip() for line in told.stdout.splitlines() if line.strip().startswith("GPU-")] or [""]


def chosen_gpus(device: str) -> list[int]:
    """The numbers of GPUs that memory.device names, as in cuda:0,1; none where it leaves the choice."""
    kind, _, numbers = device.partition(":")
    return sorted({int(number) for number in numbers.split(",")}) if kind == "cuda" and numbers else []


def start_runners(workspace: Path, trainer: Sequence[str], environment: Mapping[str, str]) -> int:
    """A detached runner for each GPU that has none; returns how many were started.  Nothing waits: none."""
    queue = Queue(workspace)
    if not queue.names():
        return 0
    missing = [gpu for gpu in gpus(environment) if not queue.is_served(gpu)]
    for number, gpu in enumerate(missing):
        start_detached([*trainer, "queue", "run", "--workspace", str(workspace), "--gpu", gpu],
                       workspace / "logs" / f"queue-{number}.log", environment)
    return len(missing)


def serve(workspace: Path, gpu: str, trainer: Sequence[str], environment: Mapping[str, str], say: Say) -> None:
    """Train what waits, in order, until nothing is left.  Another runner of the same GPU: leave it to that one."""
    queue = Queue(workspace)
    known = gpus(environment)
    mask = {VISIBLE: gpu} if gpu else {}
    while True:
        with queue.seat(gpu) as seated:
            if not seated:
                say("this GPU has its runner already")
                return
            while _serve_one(queue, gpu, known, trainer, {**environment, **mask}, dict(environment), say):
                pass
        if not queue.waiting():  # else it came while we were leaving, and whoever brought it relies on us
            return


def _serve_one(queue: Queue, gpu: str, known: Sequence[str], trainer: Sequence[str], masked: Mapping[str, str],
               whole: Mapping[str, str], say: Say) -> bool:
    """Train the next entry, if it can begin; False when there is none left."""
    with queue.claim(lambda entry: _has_room(queue, entry, gpu, known)) as entry:
        if entry is None:
            time.sleep(POLL if queue.waiting() else 0.0)
            return bool(queue.waiting())
        say(f"{entry.name} begins")
        try:
            _train(queue, entry, trainer, masked, whole)
        except UserError as error:
            queue.fail(entry, str(error))
        except OSError as error:
            queue.fail(entry, f"{error.filename or 'the run'} cannot be written: {error.strerror}")
        say(f"{entry.name}: {Run(queue.workspace / 'runs' / entry.name).state().text}")
    return True


def _train(queue: Queue, entry: Entry, trainer: Sequence[str], masked: Mapping[str, str],
           whole: Mapping[str, str]) -> None:
    """Train an entry's run to its end, from where it is; one that is cut off is taken up again.

    Raises `UserError` when it fails.
    """
    preset = presets.load(entry.path)
    run = Run(queue.workspace / "runs" / entry.name)
    environment = whole if preset.memory.device.startswith("cuda:") else masked  # that number counts all GPUs
    if not run.preset.exists():
        if entry.resumes:
            raise UserError(f"the folder of the run {run.name} is not there any more; it cannot go on")
        runs.create(queue.workspace, entry.name, presets.dumps(preset))
    since = _added(entry)  # what a run that is resumed did before says nothing of this time
    tries, reached, launch, watched = 0, run.last_step(), None, False
    while True:
        watched = _wait_while_held(run) or watched
        if not entry.path.exists():  # let go of: stopped for good
            return
        state = run.state()
        is_new = run.events.exists() and run.events.stat().st_mtime >= since
        if (state.word == "done" or (state.word == "early" and is_new)
                or (state.word == "stopped" and watched)):  # unseen: the machine went down
            entry.path.unlink(missing_ok=True)
            return
        if state.word == "failed" and is_new:
            raise UserError(state.text)
        tries, reached = (0 if run.last_step() > reached else tries), run.last_step()
        if tries == MOST_TRIES or _is_hopeless(run, since):
            raise UserError(f"its trainer died {MOST_TRIES} times at step {reached}: {_last_words(run, launch)}")
        launch = start_detached([*trainer, "--resume", str(run.path)], queue.workspace / "logs" / f"{run.name}.log",
                                environment)
        launch.process.wait()
        tries, watched = tries + 1, True


def _added(entry: Entry) -> float:
    """When an entry was put into the queue, unix seconds; moving its file does not change that."""
    try:
        return entry.path.stat().st_mtime
    except FileNotFoundError:  # let go of in this moment
        return time.time()


def _is_hopeless(run: Run, since: float) -> bool:
    """Whether the last starts all began at one step: also a machine that goes down with its run must come to an end."""
    starts = [event.get("step") for event in EventReader(run.events, kinds=("start",)).read()
              if event.get("t", since) >= since]
    return len(starts) >= MOST_TRIES and len(set(starts[-MOST_TRIES:])) == 1


def _last_words(run: Run, launch: Launch | None) -> str:
    return run.log_tail(1) or (launch.last_words() if launch else "") or f"see {run.log}"


def _wait_while_held(run: Run) -> bool:
    """Wait for a trainer that outlived its runner, or that a person started; False when there is none."""
    was_held = False
    while run.is_held():
        was_held = True
        time.sleep(POLL)
    return was_held


def _has_room(queue: Queue, entry: Entry, gpu: str, known: Sequence[str]) -> bool:
    """Whether an entry can begin on a runner's GPU, or on those that it names.

    A run takes one GPU, or as many as it names; runs that were started without the queue count too.
    """
    presets_of = {run.name: run.preset for run in _living(queue)} | {
        begun.name: begun.path for begun in queue.begun()}  # one that another runner just took has no folder yet
    living = [_gpus_of(path) for path in presets_of.values()]
    own = _gpus_of(entry.path)
    if sum(max(1, len(numbers)) for numbers in living) + min(max(1, len(own)), len(known)) > len(known):
        return False
    taken = {known[number] for numbers in living for number in numbers if number < len(known)}
    return taken.isdisjoint({known[number] for number in own if number < len(known)} or {gpu})


def _gpus_of(path: Path) -> list[int]:
    """The GPUs that a preset's file names."""
    try:
        return _named_in(path, path.stat().st_mtime_ns)
    except (OSError, UserError):  # gone, or a fault that is told when it is its turn
        return []


@lru_cache(maxsize=256)
def _named_in(path: Path, changed: int) -> list[int]:
    return chosen_gpus(presets.load(path).memory.device)


def _living(queue: Queue) -> list[Run]:
    """The runs that are being trained, or are about to be."""
    idle = {entry.name for entry in (*queue.failures(), *queue.waiting())}
    return [run for run in runs.list_runs(queue.workspace)
            if run.is_held() or (run.name not in idle and _is_beginning(run))]


def _is_beginning(run: Run) -> bool:
    """A new trainer loads its libraries before it takes its run."""
    if run.events.exists():
        return False
    try:
        return time.time() - run.preset.stat().st_mtime < BEGINNING
    except OSError:
        return False
