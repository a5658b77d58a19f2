"""What a run does between two steps: measure, save, draw, and answer requests."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from trainer import averaging, checkpoint, evaluation, gpu, prompts
from trainer.adapters import effective_rank
from trainer.best import Best, choose, steps_without_gain
from trainer.control import Requests, Stopped
from trainer.distributed import ALONE, Elsewhere, Lost
from trainer.events import EventReader, rewind
from trainer.faults import describe, out_of_memory
from trainer.memory.hold import graphs_recorded
from trainer.publish import publish
from trainer.session import Session

DISK_RESERVE = 2  # free space wanted before a checkpoint, as a multiple of the last one's size
# Alone, without a team of threads of its own: with more threads than cores, OpenMP lets all of them sleep at each wait.
SPECTRA = ThreadPoolExecutor(1, "spectra", initializer=torch.set_num_threads, initargs=(1,))
PAUSE_POLL = 0.2  # seconds between two looks while paused


def before(session: Session) -> None:
    """What is measured on the untrained model, once; or what a kill kept from following the last checkpoint."""
    _change_prompts(session)
    step, preset, world = session.progress.step, session.preset, session.world
    if step == 0:
        _tell_scaling(session)
        _measure(session, {"rank", "validation"})
        if preset.sample.before:
            attempt(session, "drawing samples", lambda: evaluation.draw_samples(session, 0, "off"))
        return
    if world.first:
        _make_up_for_kill(session)
    session.progress = world.from_first(lambda: session.progress)
    if step == session.steps or session.progress.early:
        return  # `_finish` does the rest
    rhythm = {"rank": preset.log.rank_every, "validation": preset.evaluate.every, "sample": preset.sample.every,
              "distance": preset.evaluate.distance_every}
    missed = {kind for kind, every in rhythm.items() if every and step % every == 0}
    missed -= world.from_first(lambda: told(session))
    _measure(session, missed)
    if "sample" in missed:
        attempt(session, "drawing samples", lambda: evaluation.draw_samples(session, step, session.shown_weights))
    if "distance" in missed:
        attempt(session, "measuring KID and FID", lambda: evaluation.measure_distance(session, step))


def _make_up_for_kill(session: Session) -> None:
    """What comes after a checkpoint and may be missing."""
    path = session.run.export_of(session.progress.step)
    if not path.exists():
        attempt(session, "exporting", lambda: publish(session, path), alone=True)
    tell_best(session)
    _prune(session)
    _renew_patience(session)


def _tell_scaling(session: Session) -> None:
    """StelLA's learning rate means nothing without its d."""
    if d := session.adapter.describe().get("scale_dim"):
        turn = session.preset.train.lr * d**0.5
        session.recorder.note(0, f"gradient scaling: d = {d:g}, lr·√d = {turn:.3g}: about so far the columns of U "
                              "and V turn a step")


def due_after(session: Session, since_save: float, requests: Requests) -> set[str]:
    """What the step just made calls for: by its number, by the clock, or because somebody asked."""
    step, preset = session.progress.step, session.preset
    last = step == session.steps
    rhythm = {"save": preset.output.save_every, "sample": preset.sample.every, "rank": preset.log.rank_every,
              "validation": preset.evaluate.every, "distance": preset.evaluate.distance_every}
    due = {name for name, every in rhythm.items() if every and step % every == 0}
    if last:
        due |= {"save", "validation", "rank"}
    if "save" in due:
        due.add("validation")  # so that the best checkpoint is known
    if preset.output.save_minutes and since_save > 60 * preset.output.save_minutes:
        due.add("save")
    run = requests.run
    return due | {f"asked {name}" for name in ("save", "sample", "pause", "prompts") if run.asked(name)}


def keep_house(session: Session, due: set[str], requests: Requests) -> None:
    """Between two steps: measure, save, draw."""
    step, run = session.progress.step, session.run
    _measure(session, due)
    if "validation" in due:
        session.progress.early = _why_over(session)
    if "save" in due:
        _save_for_all(session)
    if "sample" in due and step != session.steps:
        attempt(session, "drawing samples", lambda: evaluation.draw_samples(session, step, session.shown_weights))
    if "distance" in due and step != session.steps:
        attempt(session, "measuring KID and FID", lambda: evaluation.measure_distance(session, step))
        if session.world.first:
            tell_best(session)
    _answer(session)
    if session.world.from_first(lambda: run.asked("pause")):
        _pause(session, requests)


def _answer(session: Session) -> bool:
    """Do what was asked for once: save now, sample now; whether anything was."""
    run, step = session.run, session.progress.step
    _change_prompts(session)
    wants_file, wish = session.world.from_first(lambda: (run.take("save") is not None, run.take("sample")))
    if wants_file and _save_for_all(session) and session.world.first:
        attempt(session, "exporting", lambda: publish(session, run.result), alone=True)
    if wish is not None:
        prompts = wish.get("prompts")
        texts = [str(text) for text in prompts] if isinstance(prompts, list) and prompts else None
        attempt(session, "drawing samples",
                lambda: evaluation.draw_samples(session, step, session.shown_weights, texts, asked=True))
    return wants_file or wish is not None


def _change_prompts(session: Session) -> None:
    if (wish := session.world.from_first(lambda: session.run.take_text("prompts"))) is not None:
        attempt(session, "changing the prompts", lambda: prompts.change(session, wish))


def _pause(session: Session, requests: Requests) -> None:
    """Wait while `control/pause` exists; the model stays loaded, and samples can be drawn."""
    step, run = session.progress.step, requests.run
    collect_rank(session)
    session.recorder.event("paused", step=step, text="paused")
    session.recorder.say(f"paused at step {step}; it goes on when {run.control / 'pause'} is deleted")
    while not session.world.union({"go on"} if requests.stop_asked() or not run.asked("pause") else set()):
        if _answer(session):
            session.recorder.event("paused", step=step, text="paused")  # still: the last event tells the state
        time.sleep(PAUSE_POLL)
    session.recorder.event("resumed", step=step, text="resumed")


def _save_for_all(session: Session) -> bool:
    """Save in the first process; the others go on with what it saved, as they would after a resume."""
    averaging.align(session)
    return session.world.from_first(lambda: save(session))


def save(session: Session) -> bool:
    """Write a checkpoint and its export, and let go of old ones; a full disk is told, and training goes on."""
    run, progress, recorder = session.run, session.progress, session.recorder
    collect_rank(session)  # a checkpoint stands for everything up to its step
    started = time.perf_counter()
    last = checkpoint.size(run.checkpoint(run.last_step())) if run.last_step() else 0
    free = shutil.disk_usage(run.path).free
    if free < DISK_RESERVE * last:
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
    attempt(session, "exporting", lambda: publish(session, run.export_of(progress.step)), alone=True)
    tell_best(session)
    _prune(session)
    return True


def _prune(session: Session) -> None:
    """Let go of old checkpoints, but not of the best, be it by KID or by the validation loss."""
    best = {chosen.step for chosen in (_best(session), _best(session, with_kid=False)) if chosen is not None}
    checkpoint.prune(session.run, session.preset.output.keep, best)
    kept = {str(step) for step in (*session.run.checkpoint_steps(), session.progress.step)}
    session.progress.by_image = {step: own for step, own in session.progress.by_image.items() if step in kept}


def _best(session: Session, with_kid: bool = True) -> Best | None:
    run, progress = session.run, session.progress
    distances = rewind(EventReader(run.events, kinds=("start", "distance")).read()) if with_kid else []
    return choose(run.checkpoint_steps(), {int(step): loss for step, loss in progress.validation.items()},
                  {int(step): losses for step, losses in progress.by_image.items()},
                  [event for event in distances if event["kind"] == "distance"])


def tell_best(session: Session) -> None:
    """Write down which checkpoint is the best, when that or its reason has changed."""
    best = _best(session)
    told = [event for event in rewind(EventReader(session.run.events, kinds=("start", "best")).read())
            if event["kind"] == "best"]
    if best is not None and (not told or best.fields() != {key: told[-1].get(key) for key in best.fields()}):
        session.recorder.event("best", **best.fields())


def _why_over(session: Session) -> str:
    """Why the run is to end early; "" when it goes on."""
    progress, patience = session.progress, session.preset.evaluate.early_stop
    losses = {int(step): loss for step, loss in progress.validation.items()}
    count, best = steps_without_gain(losses, progress.patient_since)
    if not patience or count < patience or progress.step == session.steps:
        return ""
    if best is None:
        return f"the last {count} validation losses are no numbers"
    return f"the last {count} validations brought no lower loss than {losses[best]:.4g} at step {best}"


def _renew_patience(session: Session) -> None:
    """A run that ended early and is resumed shall go on: count its validations anew.

    One that was killed before it had ended still has to end.
    """
    progress = session.progress
    ends = [event for event in EventReader(session.run.events, kinds=("end",)).read()
            if event.get("reason") == "early" and event.get("step") == progress.step]
    if ends:
        progress.early, progress.patient_since = "", progress.step


def told(session: Session) -> set[str]:
    """The kinds of events that the run has at this step (pictures that somebody asked for do not count)."""
    return {event["kind"] for event in rewind(EventReader(session.run.events).read())
            if event.get("step") == session.progress.step and not event.get("asked")}


def _measure(session: Session, due: set[str]) -> None:
    if "rank" in due:
        attempt(session, "measuring the effective rank", lambda: _measure_rank(session))
    if "validation" in due:
        attempt(session, "measuring the validation loss", lambda: evaluation.validate(session, session.progress.step))


def _measure_rank(session: Session) -> None:
    """Take what the spectra follow from; another thread computes them while training goes on."""
    if session.preset.log.rank_every == 0 or not session.world.first:
        return
    collect_rank(session)
    sample = effective_rank.take(session.adapter)
    session.spectra = session.progress.step, SPECTRA.submit(effective_rank.summarize, sample)


def collect_rank(session: Session, wait: bool = True) -> None:
    """Write down the ranks that were last measured, when they are computed."""
    if session.spectra is None or not (wait or session.spectra[1].done()):
        return
    (step, computed), session.spectra = session.spectra, None

    def write() -> None:
        facts = computed.result()
        session.recorder.event("rank", step=step, rank=session.preset.adapter.rank, **facts)
        session.recorder.scalars(step, {f"rank/{group}": value for group, value in facts["erank"].items()})

    attempt(session, "measuring the effective rank", write, alone=True)


def attempt(session: Session, what: str, act: Callable[[], object], alone: bool = False) -> None:
    """Do something that must never end a run: a failing picture or measure is a note.

    alone: by this process, where there are others; else all of them do it, and it fails in all or in none.
    """
    world = ALONE if alone else session.world

    def do() -> None:
        act()

    try:
        world.together(do)
        return
    except (Stopped, Lost, Elsewhere):
        raise
    except Exception as error:
        crowded = out_of_memory(error)
        if not (crowded and graphs_recorded(session)):
            with suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
        text = describe(error)
        if out_of_memory(error):
            text = "it did not fit into the GPU's memory beside the model that is trained"
    if crowded and any(world.together(lambda: graphs_recorded(session))):
        if session.graphs is not None:
            session.graphs.stop(f"CUDA graphs are not used from here on: {what} needs the memory that they keep")
        attempt(session, what, act, alone)
        return
    session.recorder.note(session.progress.step, f"{what} failed, training goes on: {text}")
    gpu.free_memory()  # only here, since the error held on to what was in use
