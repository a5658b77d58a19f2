"""The training loop: set up → cache → train → finish.  The file to read first."""

from __future__ import annotations

import errno
import shutil
import time
import traceback
from pathlib import Path
from typing import TextIO

import torch

from trainer import checkpoint, evaluation, gpu, optim, speed
from trainer.adapters import effective_rank
from trainer.control import Requests, Stopped
from trainer.data.order import stream
from trainer.errors import UserError
from trainer.events import EventReader, rewind
from trainer.export.writer import NO_ROOM
from trainer.publish import publish
from trainer.readback import Readback
from trainer.record import Recorder
from trainer.run import Run
from trainer.schema import SCHEMA_VERSION, Preset
from trainer.session import Session, pick_device, set_up
from trainer.update import Update

MAX_BAD_STEPS = 3  # non-finite steps in a row that end a run
DISK_RESERVE = 2  # free space wanted before a checkpoint, as a multiple of the last one's size
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
PAUSE_POLL = 0.2  # seconds between two looks while paused


class Diverged(UserError):
    """The loss stopped being a number: what is in memory is no better than the last checkpoint."""


def run_training(run: Run, preset: Preset, workspace: Path, terminal: TextIO | None = None) -> None:
    """Train a run from where it is to its end, or until it is asked to stop.

    Raises `UserError` for what a user can cause.  Every way out that Python sees leaves a checkpoint of the last whole
    step and an `end` event that says why.
    """
    try:
        _run(run, preset, workspace, terminal)
    except Exception as error:
        if (plain := as_user_error(error)) is None or plain is error:
            raise
        raise plain from error


def _run(run: Run, preset: Preset, workspace: Path, terminal: TextIO | None) -> None:
    with run.hold(), Requests(run) as requests:
        recorder = Recorder(run, tensorboard=preset.log.tensorboard, terminal=terminal)
        session: Session | None = None
        try:
            recorder.event("start", **start_facts(run, preset))
            device = pick_device(preset)
            with gpu.turn(workspace, device, lambda: _wait(recorder, requests)):
                session = set_up(run, preset, device, workspace, recorder, requests.guard)
                reason = train(session, requests)
            recorder.event("end", step=session.progress.step, reason=reason)
            recorder.say(f"{reason} at step {session.progress.step}: {run.result}")
        except Stopped:
            recorder.event("end", step=session.progress.step if session else run.last_step(), reason="stopped")
            recorder.say("stopped; to go on: python -m trainer --resume " + str(run.path))
        except BaseException as error:
            _rescue(run, session, recorder, error)
            raise
        finally:
            recorder.close()


def train(session: Session, requests: Requests) -> str:
    """From the first step to the last; returns "done" or "stopped"."""
    preset, progress = session.preset, session.progress
    update = Update(session.adapter, session.optimizer, preset.train.max_grad_norm)
    readback = Readback(session.recorder, session.steps, session.device, preset.log.every)
    saved_at = time.monotonic()
    _before(session)
    readback.restart_clock()
    while progress.step < session.steps and not requests.stop_asked():
        started = time.perf_counter()
        torch.manual_seed(stream(preset.train.seed, progress.step, "dropout"))  # so no random state needs saving
        lr = preset.train.lr * session.schedule(progress.step)
        optim.set_lr(session.optimizer, lr)

        loss = torch.zeros((), device=session.device)
        draws = session.order.batch(progress.step)
        for start in range(0, len(draws), preset.train.batch_size):  # equal micro-batches: their means can be averaged
            session.use("raw")
            micro = session.loss(draws[start : start + preset.train.batch_size]) / preset.train.grad_accum
            session.backward(micro)
            loss += micro.detach()

        session.whole = False  # a fault inside the update leaves nothing worth saving
        grad_norm = update(loss)
        session.whole, progress.step = True, progress.step + 1
        progress.seconds += time.perf_counter() - started

        readback.push(progress.step, loss, grad_norm, session.adapter.skip, lr)
        if readback.bad_in_row >= MAX_BAD_STEPS:
            raise Diverged(_non_finite(session))
        due = _due(session, time.monotonic() - saved_at, requests)
        if due:
            readback.drain()
            _tend(session, due, requests)
            saved_at = time.monotonic() if "save" in due else saved_at
            readback.restart_clock()
    readback.drain()
    speed.remember(session)
    return _finish(session, requests)


def _wait(recorder: Recorder, requests: Requests) -> None:
    recorder.phase("waiting for the GPU, which another run is using")
    requests.guard()


def start_facts(run: Run, preset: Preset) -> dict[str, object]:
    """The fields of a `start` event."""
    import hashlib
    import os
    import platform

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"v": SCHEMA_VERSION, "step": run.last_step(), "steps": preset.train.steps, "pid": os.getpid(),
            "host": platform.node(), "device": device, "torch": torch.__version__,
            "preset_sha": hashlib.sha256(run.preset.read_bytes()).hexdigest()[:16]}


def _before(session: Session) -> None:
    """What is measured on the untrained model, once; or what a kill kept from following the last checkpoint."""
    step, preset = session.progress.step, session.preset
    if step == 0:
        _measure_rank(session)
        evaluation.validate(session, 0)
        if preset.sample.before:
            _try(session, "drawing samples", lambda: evaluation.draw_samples(session, 0, "off"))
        return
    if not session.run.export_of(step).exists():
        _try(session, "exporting", lambda: publish(session, session.run.export_of(step)))
    _prune(session)
    if step == session.steps:
        return  # `_finish` does the rest
    rhythm = {"sample": preset.sample.every, "distance": preset.evaluate.distance_every}
    missed = {kind for kind, every in rhythm.items() if every and step % every == 0} - _told(session)
    if "sample" in missed:
        _try(session, "drawing samples", lambda: evaluation.draw_samples(session, step, session.shown_weights))
    if "distance" in missed:
        _try(session, "measuring KID and FID", lambda: evaluation.measure_distance(session, step))


def _due(session: Session, since_save: float, requests: Requests) -> set[str]:
    """What the step just made calls for: by its number, by the clock, or because somebody asked."""
    step, preset = session.progress.step, session.preset
    last = step == session.steps
    rhythm = {"save": preset.output.save_every, "sample": preset.sample.every, "rank": preset.log.rank_every,
              "validate": preset.evaluate.every, "distance": preset.evaluate.distance_every}
    due = {name for name, every in rhythm.items() if every and step % every == 0}
    if last:
        due |= {"save", "validate", "rank"}
    if "save" in due:
        due.add("validate")  # so that the best checkpoint is known
    if preset.output.save_minutes and since_save > 60 * preset.output.save_minutes:
        due.add("save")
    run = requests.run
    return due | {f"asked {name}" for name in ("save", "sample", "pause") if run.asked(name)}


def _tend(session: Session, due: set[str], requests: Requests) -> None:
    """Between two steps: measure, save, draw."""
    step, run = session.progress.step, session.run
    if "rank" in due:
        _measure_rank(session)
    if "validate" in due:
        evaluation.validate(session, step)
    if "save" in due:
        save(session)
    if "sample" in due and step != session.steps:
        _try(session, "drawing samples", lambda: evaluation.draw_samples(session, step, session.shown_weights))
    if "distance" in due and step != session.steps:
        _try(session, "measuring KID and FID", lambda: evaluation.measure_distance(session, step))
    _answer(session)
    if run.asked("pause"):
        _pause(session, requests)


def _answer(session: Session) -> None:
    """Do what was asked for once: save now, sample now."""
    run, step = session.run, session.progress.step
    if run.take("save") is not None and save(session):
        publish(session, run.result)
    if (wish := run.take("sample")) is not None:
        prompts = [str(text) for text in wish.get("prompts", [])] or None
        _try(session, "drawing samples",
             lambda: evaluation.draw_samples(session, step, session.shown_weights, prompts, asked=True))


def _pause(session: Session, requests: Requests) -> None:
    """Wait while `control/pause` exists; the model stays loaded, and samples can be drawn."""
    step = session.progress.step
    session.recorder.event("paused", step=step, text="paused")
    while requests.run.asked("pause") and not requests.stop_asked():
        _answer(session)
        time.sleep(PAUSE_POLL)
    session.recorder.event("resumed", step=step, text="resumed")


def save(session: Session) -> bool:
    """Write a checkpoint and its export, and let go of old ones; a full disk is told, and training goes on."""
    run, progress, recorder = session.run, session.progress, session.recorder
    started = time.perf_counter()
    existing = [sum(file.stat().st_size for file in run.checkpoint(step).iterdir()) for step in run.checkpoint_steps()]
    free = shutil.disk_usage(run.path).free
    if existing and free < DISK_RESERVE * existing[-1]:
        recorder.note(progress.step, f"no checkpoint at step {progress.step}: the disk of {run.path} has only "
                      f"{free / 2**20:.0f} MB left; free some space")
        return False
    try:
        size = checkpoint.save(run, progress, session.adapter.state_dict(), session.optimizer.state_dict())
    except OSError as error:
        recorder.note(progress.step, f"no checkpoint at step {progress.step}: {error.strerror or error}; the "
                      "earlier ones are whole. Free some space; the next save tries again")
        return False
    recorder.event("checkpoint", step=progress.step, path=str(run.checkpoint(progress.step).relative_to(run.path)),
                   bytes=size, sec=round(time.perf_counter() - started, 3))
    _try(session, "exporting", lambda: publish(session, run.export_of(progress.step)))
    _prune(session)
    return True


def _prune(session: Session) -> None:
    """Let go of old checkpoints, but not of the one with the best validation loss."""
    validation = session.progress.validation
    best = min(validation, key=validation.__getitem__, default="0")
    checkpoint.prune(session.run, session.preset.output.keep, {int(best)})


def _finish(session: Session, requests: Requests) -> str:
    """Leave a checkpoint, the last pictures and distances, and the file to use."""
    run, progress = session.run, session.progress
    done = progress.step >= session.steps
    if not run.checkpoint(progress.step).exists() and progress.step and not save(session):
        raise UserError(f"{run.path}: the last checkpoint could not be written ({run.log} says why); free some "
                        "space, then resume")
    if progress.step:
        publish(session, run.result)
    if done:
        told = _told(session)
        if "sample" not in told:
            _try(session, "drawing samples",
                 lambda: evaluation.draw_samples(session, progress.step, session.shown_weights))
        if "distance" not in told:
            _try(session, "measuring KID and FID", lambda: evaluation.measure_distance(session, progress.step))
    return "done" if done else "stopped"


def _told(session: Session) -> set[str]:
    """The kinds of events that the run has at this step (pictures that somebody asked for do not count)."""
    return {event["kind"] for event in rewind(EventReader(session.run.events).read())
            if event.get("step") == session.progress.step and not event.get("asked")}


def _measure_rank(session: Session) -> None:
    if session.preset.log.rank_every == 0:
        return
    facts = effective_rank.measure(session.adapter)
    session.recorder.event("rank", step=session.progress.step, rank=session.preset.adapter.rank, **facts)
    session.recorder.scalars(session.progress.step, {f"rank/{group}": value for group, value in facts["erank"].items()})


def _rescue(run: Run, session: Session | None, recorder: Recorder, error: BaseException) -> None:
    """Keep what can be kept when a run breaks, and say why in its last event."""
    try:
        if (session is not None and session.whole and not isinstance(error, Diverged)
                and session.progress.step > run.last_step()):
            save(session)
        step = session.progress.step if session else run.last_step()
        recorder.event("end", step=step, reason="error", error=describe(error))
    except Exception:  # the first fault is the one to tell
        traceback.print_exc()


def describe(error: BaseException) -> str:
    """An error in a sentence."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(as_user_error(error) or f"{type(error).__name__}: {error}")


def as_user_error(error: BaseException) -> UserError | None:
    """What a user can mend, in a user's words: memory or disk that ran out; None for a fault of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return UserError("the GPU ran out of memory: make train.batch_size or data.resolution smaller, "
                         "or set memory.gradient_checkpointing = true")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return UserError("the memory of this machine ran out: make train.batch_size or data.resolution smaller, "
                         "or close other programs")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return UserError(f"{error.filename or 'a file'} cannot be written: {error.strerror}. Make room on that disk, "
                         "then resume the run")
    if isinstance(error, OSError) and error.errno in REFUSED:
        return UserError(f"{error.filename or 'a file'} cannot be used: {error.strerror}. Give this user the right "
                         "to it, or choose another --workspace")
    return None


def _try(session: Session, what: str, act: object) -> None:
    """Do something that must never end a run: a failing picture or measure is a note."""
    try:
        act()  # type: ignore[operator]
    except Stopped:
        raise
    except Exception as error:
        traceback.print_exc()
        session.recorder.note(session.progress.step, f"{what} failed, training goes on: {describe(error)}")


def _non_finite(session: Session) -> str:
    """What three steps without a finite loss most likely mean."""
    causes = ["train.lr is too high"]
    if session.dtype == torch.float16:
        causes.append("fp16 overflows with this base: try train.precision = 'bf16' or 'fp32'")
    return (f"{MAX_BAD_STEPS} steps in a row had no finite loss, up to step {session.progress.step}. Likely: "
            f"{'; or '.join(causes)}. The last good checkpoint is step {session.run.last_step()}")
