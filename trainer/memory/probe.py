"""Finds by measuring the fastest way to hold a model that fits the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from trainer import averaging, gpu, optim
from trainer.data.order import stream
from trainer.distributed import ALONE, World
from trainer.errors import UserError
from trainer.faults import out_of_memory
from trainer.memory.hold import change, let_go
from trainer.memory.meter import GIB, Meter
from trainer.memory.plan import FULL, Plan
from trainer.memory.shards import Shards
from trainer.record import Recorder
from trainer.session import Session, build_optimizer
from trainer.update import EAGER_CALLS, Update

STEPS = EAGER_CALLS + 1  # with the one whose optimizer step is captured as a graph
ROUNDS = 2  # micro-batches a step: from the second on nothing more is held
OPTIMISM = 0.9  # of an estimate: a plan that just may fit is worth measuring

Build = Callable[[Plan], Session]
Peaks = dict[Plan, int | None]


def worth_trying(ladder: Sequence[Plan], fits: Callable[[Plan, float], bool], limit: int) -> Iterator[Plan]:
    """The plans that may fit the limit by their estimates, which are made when it comes to them; the last one always.
    """
    return (plan for plan in ladder if plan == ladder[-1] or fits(plan, limit / OPTIMISM))


def settle(build: Build, plans: Iterable[Plan], blocks: int, meter: Meter | None, recorder: Recorder,
           world: World = ALONE) -> tuple[Session, Peaks]:
    """A session that holds its model in the first way that fits, and each measured plan's peak in bytes (None: it
    did not fit).

    plans: from the fastest on, for a model of so many blocks.  Without a meter the first that can be loaded is taken.
    Several processes try the same plans together, and what does not fit one of them is left by all.  The session is as
    if nothing had been measured.  Raises `UserError` when no plan fits.
    """
    trial, tried = Trial(build), Peaks()
    for plan in plans:
        if not all(world.together(lambda plan=plan: trial.hold(plan))):
            trial.drop()
            tried[plan] = None
            continue
        if meter is None:
            return trial.session, tried
        recorder.phase("measuring memory")
        peaks = world.together(lambda: measure(trial.session, meter))
        tried[plan] = None if None in peaks else max(peaks)
        if all(world.together(lambda plan=plan: tried[plan] is not None and tried[plan] <= FULL * meter.limit)):
            return trial.session, tried
    raise too_little(tried, blocks, meter.limit if meter else 0)


class Trial:
    """A session that goes from plan to plan, and loads weights again only when they have to be quantised otherwise."""

    def __init__(self, build: Build) -> None:
        self.build, self.session = build, None

    def hold(self, plan: Plan) -> bool:
        """Whether the model could be loaded and held so."""
        try:
            if self.session is not None and (self.session.plan.quantize, self.session.plan.shards) == (
                    plan.quantize, plan.shards):
                change(self.session, plan)
            else:
                self.drop()
                self.session = self.build(plan)
            return True
        except Exception as error:
            if not out_of_memory(error):
                raise
        self.drop()
        return False

    def drop(self) -> None:
        """Let go of what is loaded."""
        if self.session is not None:
            let_go(self.session)
        self.session = None
        gpu.free_memory()


def measure(session: Session, meter: Meter) -> int | None:
    """Peak bytes of a few real steps on the largest batch; None when they do not fit.

    All they changed is put back: what a resume restores is all that a run is.
    """
    kept = {key: tensor.to("cpu", copy=True) for key, tensor in session.adapter.state_dict().items()}
    peak = None
    try:
        with torch.random.fork_rng([session.device] if session.device.type == "cuda" else []):
            peak = _take_steps(session, meter)
    except Exception as error:
        if not out_of_memory(error):
            raise
    session.optimizer = None  # its memory goes before that of the new one comes
    gpu.free_memory()
    session.adapter.zero_grad()
    session.adapter.load_state_dict(kept)
    session.optimizer = build_optimizer(session.preset, session.adapter)
    return peak


def _take_steps(session: Session, meter: Meter) -> int:
    meter.restart()
    update = Update(session.adapter, session.optimizer, session.preset.train.max_grad_norm)
    optim.set_lr(session.optimizer, session.preset.train.lr)
    step = largest_step(session)
    for _ in range(STEPS):
        session.guard()
        torch.manual_seed(stream(session.preset.train.seed, step, "dropout"))
        update(session.gradients(session.order.batch(step), ROUNDS))
    beside = session.offload.uncounted if isinstance(session.offload, Shards) else 0
    return meter.peak() + beside + averaging.bytes_of(session)  # the averager is made with the state that is resumed


def largest_step(session: Session) -> int:
    """A step of the first epoch whose pictures are largest, and of those one whose captions are longest."""

    def size(step: int) -> tuple[int, int]:
        draws = session.order.batch(step)
        width, height = session.latents.sizes[draws[0].item]
        return width * height, max(len(caption) for draw in draws for caption in session.captions[draw.item])

    return max(range(session.order.steps_per_epoch), key=size)


# In words.


def told(plan: Plan, tried: Peaks, blocks: int, limit: int) -> str:
    """What was chosen, and why not what is faster."""
    lines = [f"Memory: {limit / GIB:.1f} GiB. Chosen: {plan.in_words(blocks)}."]
    if (peak := tried.get(plan)) is not None:
        lines.append(f"Measured peak {peak / GIB:.1f} GiB.")
    faster = [f"{other.in_words(blocks)} {_took(peak)}" for other, peak in tried.items() if other != plan]
    if faster:
        lines.append(f"Did not fit: {'; '.join(faster)}.")
    return " ".join(lines)


def too_little(tried: Peaks, blocks: int, limit: int) -> UserError:
    """The fault of a GPU on which not even the last plan fits."""
    plan, peak = list(tried.items())[-1]
    need = f"needs {peak / GIB:.1f} GiB" if peak is not None else "needs more"
    there = f"this run may take {limit / GIB:.1f} GiB of it, and even" if limit else "even"
    return UserError(f"the GPU's memory is too small: {there} with "
                     f"{plan.in_words(blocks)} it {need}. Make data.resolution, train.batch_size or adapter.rank "
                     "smaller, choose a smaller model, or leave to auto what [memory] fixes")


def _took(peak: int | None) -> str:
    return "(out of memory)" if peak is None else f"({peak / GIB:.1f} GiB)"
