"""The training loop: set up → cache → train → finish.  The file to read first."""

from __future__ import annotations

import hashlib
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from trainer import averaging, evaluation, gpu, housekeeping, optim, speed
from trainer.control import Requests, Stopped
from trainer.data.order import Draw, stream
from trainer.distributed import ALONE, Lost, SharedRequests, World
from trainer.download import fetch_base
from trainer.errors import UserError
from trainer.fast import start as fast
from trainer.faults import Diverged, as_user_error, describe, diverged, out_of_memory
from trainer.memory.hold import step_down
from trainer.memory.meter import Meter, meter_of
from trainer.publish import publish
from trainer.readback import Readback
from trainer.record import Recorder, Silent
from trainer.run import Run
from trainer.sample_losses import SampleLosses
from trainer.schema import SCHEMA_VERSION, Preset
from trainer.session import Session, pick_device
from trainer.setup import set_up
from trainer.update import Update

PROGRAMS = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors")
MAX_BAD_STEPS = 3  # non-finite steps in a row that end a run


def run_training(run: Run, preset: Preset, workspace: Path, terminal: TextIO | None = None,
                 measured_by: Callable[[torch.device, float], Meter | None] = meter_of, world: World = ALONE) -> None:
    """Train a run from where it is to its end, or until it is asked to stop.

    measured_by: makes the meter of a device within a budget in GiB; None has no say in how the model is held.
    world: the processes that do it together, each of which calls this; the first one alone writes to the run's folder.
    Raises `UserError` for what a user can cause.  Every way out that Python sees leaves a checkpoint of the last whole
    step and an `end` event that says why.
    """
    try:
        _run(run, preset, workspace, terminal, measured_by, world)
    except Exception as error:
        world.farewell(error)
        if (plain := as_user_error(error)) is None or plain is error:
            raise
        raise plain from error


def _run(run: Run, preset: Preset, workspace: Path, terminal: TextIO | None,
         measured_by: Callable[[torch.device, float], Meter | None], world: World) -> None:
    with run.hold() if world.first else nullcontext(), SharedRequests(run, world) as requests:
        recorder = Recorder(run, tensorboard=preset.log.tensorboard, terminal=terminal) if world.first else Silent(run)
        session: Session | None = None
        try:
            device = pick_device(preset, world)
            gpu.use_cores(world.local_size)
            if device.type == "cuda":
                torch.cuda.set_device(device.index or 0)  # events and graphs are made on the current one
            recorder.event("start", **start_facts(run, preset, device, world.size))
            world.together(lambda: None if world.local_rank else fetch_base(preset, recorder, requests.guard))
            with _turn(world, workspace, device, lambda: _wait(recorder, requests)):
                session = _set_up(run, preset, device, workspace, recorder, requests, measured_by, world)
                reason = train(session, requests)
            why = {"text": session.progress.early} if reason == "early" else {}
            recorder.event("end", step=session.progress.step, reason=reason,
                           trained_sec=round(session.progress.seconds, 1), **why)
            said = f"stopped early, since {session.progress.early}," if why else reason
            recorder.say(f"{said} at step {session.progress.step}: {run.result}")
        except Stopped:
            recorder.event("end", step=session.progress.step if session else run.last_step(), reason="stopped")
            recorder.say("stopped; to go on: python -m trainer --resume " + str(run.path))
        except Lost as error:
            raise _left_alone(run, session, recorder, error) from error
        except BaseException as error:
            if world.first:
                _rescue(run, session, recorder, error)
            raise
        finally:
            if session is not None and session.prefetch is not None:
                session.prefetch.close()
            recorder.close()


def _set_up(run: Run, preset: Preset, device: torch.device, workspace: Path, recorder: Recorder, requests: Requests,
            measured_by: Callable[[torch.device, float], Meter | None], world: World) -> Session:
    made: list[Session] = []
    world.together(lambda: made.append(set_up(run, preset, device, workspace, recorder, requests.guard,
                                              measured_by(device, preset.memory.budget_gb), world)))
    return made[0]


@contextmanager
def _turn(world: World, workspace: Path, device: torch.device, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold every process's GPU; they are taken in turn, so that two runs never wait for each other."""
    with ExitStack() as held:
        for rank in range(world.size):
            world.together(lambda rank=rank: held.enter_context(gpu.turn(workspace, device, on_wait))
                           if rank == world.rank else None)
        yield


def train(session: Session, requests: Requests) -> str:
    """From the first step to the last; returns "done", "early" (no gain was left) or "stopped"."""
    preset, progress, world = session.preset, session.progress, session.world
    session.averager = averaging.prepare(session)
    update = Update(session.adapter, session.optimizer, preset.train.max_grad_norm)
    readback = Readback(session.recorder, session.steps, session.device, preset.log.every, _sample_losses(session))
    saved_at = time.monotonic()
    world.together(lambda: fast.prepare(session))  # first, so that what is measured before the steps is measured alike
    world.together(lambda: housekeeping.before(session))
    progress = session.progress
    readback.restart_clock()
    due = world.union(_stop(requests))
    while progress.step < session.steps and not progress.early and "stop" not in due:
        started = time.perf_counter()
        torch.manual_seed(stream(preset.train.seed, progress.step, world.own("dropout")))  # no random state to save
        lr = preset.train.lr * session.schedule(progress.step)
        optim.set_lr(session.optimizer, lr)

        draws = session.order.batch(progress.step)
        loss = _gradients(session, draws)
        if loss is None:  # out of memory: the model is held in a more sparing way now, and the step is done again
            readback.restart_clock(new_pace=True)
            continue

        loss, seen = session.averager(loss, session.seen) if session.averager else (loss, session.seen)
        grad_norm = _update(session, update, loss)
        progress.seconds += time.perf_counter() - started

        readback.push(progress.step, loss, grad_norm, session.adapter.skip, lr, [draw.item for draw in draws],
                      seen)
        housekeeping.collect_rank(session, wait=False)
        if readback.bad_in_row >= MAX_BAD_STEPS:
            raise diverged(progress.step, session.run.last_step(), session.dtype, MAX_BAD_STEPS)
        due = world.union(housekeeping.due_after(session, time.monotonic() - saved_at, requests) | _stop(requests))
        if due - {"stop"}:
            readback.drain()
            with suppress(Stopped):  # asked for while measuring or drawing: the step itself is whole, and is kept
                world.together(lambda due=due: housekeeping.keep_house(session, due, requests))
            saved_at = time.monotonic() if "save" in due else saved_at
            readback.restart_clock()
            due = world.union(_stop(requests))
    readback.finish()
    fast.finish(session)
    reason = world.together(lambda: _finish(session))[0]
    housekeeping.attempt(session, "noting down the speed", lambda: speed.remember(
        session.cache.root.parent, preset, session.device, session.recorder.seconds_per_step(), world.size))
    return reason


def _stop(requests: Requests) -> set[str]:
    return {"stop"} if requests.stop_asked() else set()


def _update(session: Session, update: Update, loss: Tensor) -> Tensor:
    """The step itself; returns the gradient's norm."""
    session.whole = False  # a fault inside leaves nothing worth saving
    if session.averager:
        session.averager.mark(session.progress.step + 1, ended=False)
    grad_norm = update(loss)
    session.progress.step += 1
    session.shrink()
    if session.averager:
        session.averager.mark(session.progress.step, ended=True)
    session.whole = True
    return grad_norm


def _sample_losses(session: Session) -> SampleLosses:
    files = [None if item.prior else str(item.path) for item in session.latents.items]
    return SampleLosses(files, session.objective.num_timesteps, session.preset.log.rank_every)


def _gradients(session: Session, draws: Sequence[Draw]) -> Tensor | None:
    """The loss of the coming step, its gradients added up; None when it did not fit and has to be done again."""
    try:
        following = session.progress.step + 1
        coming = session.order.batch(following) if session.prefetch and following < session.steps else ()
        losses: list[Tensor] = []
        session.world.together(lambda: losses.append(session.gradients(draws, coming=coming)), quick=True)
        return losses[0]
    except Exception as error:
        if not out_of_memory(error):
            raise
    step_down(session)  # only here, since the error held on to what the step had in memory
    return None


def _wait(recorder: Recorder, requests: Requests) -> None:
    recorder.phase("waiting for the GPU, which another run is using")
    requests.guard()


def _finish(session: Session) -> str:
    """Leave a checkpoint, the last pictures and distances, and the file to use."""
    run, progress = session.run, session.progress
    housekeeping.collect_rank(session)
    done = progress.step >= session.steps or bool(progress.early)
    first = session.world.first
    if first and progress.step and not run.checkpoint(progress.step).exists() and not housekeeping.save(session):
        raise UserError(f"{run.path}: the last checkpoint could not be written ({run.log} says why); free some "
                        "space, then resume")
    if first and progress.step:
        publish(session, run.result)
    if done:
        told = session.world.from_first(lambda: housekeeping.told(session))
        if "sample" not in told:
            housekeeping.attempt(session, "drawing samples",
                 lambda: evaluation.draw_samples(session, progress.step, session.shown_weights))
        if "distance" not in told:
            housekeeping.attempt(session, "measuring KID and FID",
                                 lambda: evaluation.measure_distance(session, progress.step))
        if first:
            housekeeping.tell_best(session)
    return "stopped" if not done else "early" if progress.step < session.steps else "done"


def _rescue(run: Run, session: Session | None, recorder: Recorder, error: BaseException) -> None:
    """Keep what can be kept when a run breaks, and say why in its last event."""
    try:
        if (session is not None and session.whole and not isinstance(error, Diverged)
                and session.progress.step > run.last_step()):
            housekeeping.save(session)
        step = session.progress.step if session else run.last_step()
        recorder.event("end", step=step, reason="error", error=describe(error))
    except Exception:  # the first fault is the one to tell
        with suppress(OSError):  # the log's disk may be full
            traceback.print_exc()


def _left_alone(run: Run, session: Session | None, recorder: Recorder, error: Lost) -> Lost:
    """Save the last whole step when another process is lost, and say how to go on."""
    step = run.last_step()
    try:
        if recorder.writes and session is not None and session.averager is not None:
            step = averaging.save_alone(session, session.averager)
    except Exception:  # the lost process is the one to tell
        traceback.print_exc()
    saved = f"The run is saved up to step {step}" if step else "Nothing was saved yet"
    parting = Lost(f"{error}. {saved}; go on with python -m trainer --resume {run.path}, on as many GPUs as are there")
    recorder.event("end", step=step, reason="error", error=str(parting))
    return parting


def start_facts(run: Run, preset: Preset, device: torch.device, processes: int = 1) -> dict[str, object]:
    """The fields of a `start` event."""
    processor = f"{device.type.upper()} ({platform.processor() or platform.machine()})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    origin = run.origin()
    return {"v": SCHEMA_VERSION, "step": run.last_step(), "steps": preset.train.steps, "pid": os.getpid(),
            "host": platform.node(), "device": name, "torch": torch.__version__, "versions": versions(),
            "preset_sha": hashlib.sha256(run.preset.read_bytes()).hexdigest()[:16],
            **({"from": origin._asdict()} if origin else {}), **({"processes": processes} if processes > 1 else {})}


def versions() -> dict[str, str]:
    """Of what a run's numbers may depend on."""
    known = {"python": platform.python_version()}
    for name in PROGRAMS:
        with suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return known | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})
