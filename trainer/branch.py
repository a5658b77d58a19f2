"""Begins a new run at a checkpoint of another one: with that adapter, and other settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer import preset as presets
from trainer import run as runs
from trainer.errors import UserError
from trainer.export import header
from trainer.files import write_atomic
from trainer.queue import Queue
from trainer.run import Origin, Run
from trainer.schema import Preset

TENSORS = ("adapter.safetensors", "optimizer.safetensors")
PROGRESS = "progress.json"
# What the saved adapter is made of: a checkpoint of another kind cannot be taken over
SAME = {"model": ("family",), "adapter": ("method", "rank", "init", "dora", "diagonal", "targets", "fuse_qkv",
                                          "target_pattern", "start_from")}
# What decides how much memory a step takes: where it changes, the model is held in a way that is chosen anew
HELD = {"model": None, "memory": None, "data": ("resolution",), "train": ("batch_size", "precision", "matmul")}


def preset_of(origin: Run, overrides: Iterable[str] = ()) -> Preset:
    """The preset of a run with changes as in `--set`; `UserError` for one that a branch cannot have."""
    before, given = presets.load(origin.preset), list(overrides)
    try:
        after = presets.load(origin.preset, given)
    except UserError:  # another rank, say, does not go with the alpha that is written out, which is not the point
        names = [item.partition("=")[0].strip() for item in given]
        if fixed := [name for name in names if name.partition(".")[2] in SAME.get(name.partition(".")[0], ())]:
            raise _refusal(fixed) from None
        raise
    check(before, after)
    return after


def check(before: Preset, after: Preset) -> None:
    """Refuse changes with which the saved adapter does not fit."""
    changed = _changed(before, after, SAME)
    if changed:
        raise _refusal(changed)


def _refusal(changed: Sequence[str]) -> UserError:
    return UserError(f"a branch goes on with the adapter of its checkpoint, so it cannot change {', '.join(changed)}. "
                     "Begin a new run with adapter.start_from = an exported file of that run instead, which takes "
                     "over what was learned as far as it fits")


def begin(workspace: Path, origin: Run, step: int | None, preset: Preset, name: str | None = None) -> Run:
    """A new run that starts from a checkpoint of another one (None: the last), which is not touched.

    Its folder is there at once and whole; `--resume` trains it, from that step on.  Without a name it gets the first
    free one after the other run's.  Raises `UserError` for what cannot be.
    """
    before, queued = presets.load(origin.preset), Queue(workspace).names()
    check(before, preset)
    step = _check_step(origin, step, preset)
    name = runs.free_name(workspace, origin.name, queued) if name is None else name
    runs.check_name(name)
    run = Run(workspace / "runs" / name)
    if run.never_began():
        shutil.rmtree(run.path)
    if run.path.exists() or name in queued:
        raise UserError(f"there is already a run called {name!r}, or one waits in the queue; give another --name")
    aside = run.path.parent / f".branch-{name}"  # a level too deep to be taken for a run
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _build(Run(aside / name), origin, step, before, preset)
        os.rename(aside / name, run.path)
    except OSError as error:
        raise UserError(f"{run.path} cannot be written: {error.strerror}; make room, or choose another --workspace"
                        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return run


def _check_step(origin: Run, step: int | None, preset: Preset) -> int:
    """The step of a whole checkpoint that leaves something to train."""
    saved = origin.checkpoint_steps()
    if not saved:
        raise UserError(f"{origin.name} has no checkpoint yet to branch from")
    step = saved[-1] if step is None else step
    if step not in saved:
        raise UserError(f"{origin.name} has no checkpoint at step {step}; it has: {', '.join(map(str, saved))}")
    if preset.train.steps is not None and preset.train.steps <= step:
        raise UserError(f"train.steps = {preset.train.steps}: a branch goes on counting at its checkpoint, which is at "
                        f"step {step}; set train.steps to more than that")
    return step


def _build(run: Run, origin: Run, step: int, before: Preset, after: Preset) -> None:
    """The new run's folder: preset, origin, and the checkpoint."""
    source, goal = origin.checkpoint(step), run.checkpoint(step)
    goal.mkdir(parents=True)
    run.control.mkdir()
    progress = _read_progress(source)
    for file in TENSORS:
        _take(source / file, goal / file)
        header.read(goal / file)  # whole
    write_atomic(goal / PROGRESS, json.dumps(progress | _fresh(step, progress, before, after)).encode())
    write_atomic(run.preset, presets.dumps(after).encode())
    run.note_origin(Origin(origin.name, step))


def _fresh(step: int, progress: dict[str, Any], before: Preset, after: Preset) -> dict[str, Any]:
    """What does not go over to the branch, or is another's there."""
    held_anew = bool(_changed(before, after, HELD))
    fresh = [part for part, is_new in (
        ("optimizer", before.train.optimizer != after.train.optimizer),
        ("average", (before.train.ema_decay > 0) != (after.train.ema_decay > 0)),
        ("plan", held_anew)) if is_new]
    return {"fresh": fresh, "early": "", "patient_since": step, **({"matmul": "auto"} if held_anew else {}),
            "global_batch": 0}  # as many images a step as its preset and the processes that begin it make


def _changed(before: Preset, after: Preset, watched: dict[str, tuple[str, ...] | None]) -> list[str]:
    """The settings among those watched (None: the whole section) that differ."""
    return [f"{name}.{key}" for name, keys in watched.items()
            for key in (keys or type(getattr(before, name)).model_fields)
            if getattr(getattr(before, name), key) != getattr(getattr(after, name), key)]


def _read_progress(folder: Path) -> dict[str, Any]:
    try:
        progress = json.loads((folder / PROGRESS).read_bytes())
    except (OSError, ValueError):
        progress = None
    if not isinstance(progress, dict):
        raise UserError(f"{folder} is damaged or was just deleted; choose another checkpoint")
    return progress


def _take(source: Path, goal: Path) -> None:
    """The same file under two names, since nobody ever changes it; a copy where the disk has no such links."""
    try:
        os.link(source, goal)
    except FileNotFoundError:
        raise UserError(f"{source.parent} is damaged or was just deleted; choose another checkpoint") from None
    except OSError:
        shutil.copyfile(source, goal)
