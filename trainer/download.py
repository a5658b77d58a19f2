"""Brings what a preset names on the hub to this machine, telling how far it is."""

from __future__ import annotations

from collections.abc import Callable

from trainer import families
from trainer.families import hub, opening
from trainer.families.hub import Plan, Progress
from trainer.record import Recorder, clock
from trainer.schema import Preset

_BESIDE = ("tokenizer", "tokenizer_2", "scheduler")  # small folders of a model, beside its parts


def missing(preset: Preset) -> list[Plan]:
    """What has to be downloaded before the base can be opened; without a network when nothing has.

    Parts that the preset gives apart from the base do not count. Raises UserError when the hub has no such model,
    does not give it, or cannot be reached, and when it is of another family.
    """
    model, plans = preset.model, []
    if hub.is_hub_id(model.base):
        parts = [name for name in families.get(model.family).PARTS if not getattr(model, name, "")]
        if not opening.is_here(model.base, parts):
            plan = hub.plan(model.base, [*parts, *_BESIDE])
            opening.check_folder(hub.fetch_telling(plan), model.family, model.base)
            plans.append(plan)
    for chosen in filter(None, (model.tokenizer, model.tokenizer_2)):
        if hub.is_hub_id(chosen) and hub.cached_tokenizer(chosen) is None:
            plans.append(hub.plan_tokenizer(chosen))
    return plans


def fetch_base(preset: Preset, recorder: Recorder, guard: Callable[[], None]) -> None:
    """Download what is missing, as events. `guard` may raise in between: the next try goes on where this one was.

    Raises UserError for a full disk, and as `missing` does.
    """
    for plan in missing(preset):
        hub.check_room(plan)
        recorder.say(f"downloading {plan.repo} from the hub: {size(plan.bytes)}")
        for progress in hub.fetch(plan):
            guard()
            recorder.phase("downloading the base model", progress.done, progress.of, describe(progress))


def size(count: int) -> str:
    """Bytes for people: "8.1 GB"."""
    unit, scale = _unit(count)
    return f"{count / scale:.1f} {unit}"


def _unit(count: int) -> tuple[str, float]:
    return ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)


def describe(progress: Progress) -> str:
    """How far a download is, in words: "3.2 of 8.1 GB, file 2 of 7, 45 MB/s, 2 min left"."""
    unit, scale = _unit(progress.of)
    words = [f"{progress.done / scale:.1f} of {progress.of / scale:.1f} {unit}",
             f"file {progress.file} of {progress.files}"]
    if progress.speed > 0 and progress.done < progress.of:
        left = (progress.of - progress.done) / progress.speed
        words += [f"{progress.speed / 1e6:.3g} MB/s", f"{clock(left)} left"]
    return ", ".join(words)
