"""How a run's model is to be held: as its checkpoint says, as is remembered of this GPU, or as is measured now."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from trainer import families, speed
from trainer.checkpoint import Progress
from trainer.distributed import ALONE, World
from trainer.errors import UserError
from trainer.memory.blocks import repeated_blocks
from trainer.memory.estimate import Estimator
from trainer.memory.hold import working
from trainer.memory.meter import Meter
from trainer.memory.plan import FULL, LADDER, Plan, below, for_gpus, plain, rungs
from trainer.memory.probe import Build, settle, told, worth_trying
from trainer.memory.shards import Neighbours
from trainer.memory.trace import META
from trainer.record import Recorder
from trainer.schema import Preset
from trainer.session import Session, pick_dtype

LIKE = 1.1  # times the memory that there was: with more than that, what is faster may fit too


def choose(build: Build, preset: Preset, base: Any, device: torch.device, saved: Progress | None, meter: Meter | None,
           recorder: Recorder, workspace: Path, world: World = ALONE,
           neighbours: Neighbours | None = None) -> Session:
    """A session whose model is held in the fastest way that fits; a note says how, and why.

    saved: of the run's last checkpoint, whose plan is kept, so that the run goes on with the same numbers.  Several
    processes (`world`) decide alike, by the one that has the least room; neighbours: those that can hold the model
    together.
    """
    family, gpus = families.get(preset.model.family), len(neighbours.ranks) if neighbours else 1
    skeleton = family.load_denoiser(base, META, torch.float32)
    blocks = len(repeated_blocks(skeleton))
    if saved is not None:
        plan = Plan(**saved.plan) if saved.plan else plain(preset, blocks)  # older runs had nothing to choose
        plan = for_gpus(plan, preset.memory, gpus)
        plans = chain([plan], working(below(preset, blocks, plan, gpus), device, world))
        return settle(build, plans, blocks, None, recorder, world)[0]
    if meter is None:
        return settle(build, [_without_gpu(preset, blocks, device, gpus)], blocks, None, recorder, world)[0]
    ladder = rungs(preset, blocks, gpus)
    name, limit = speed.device_name(device, world.size), min(world.together(lambda: meter.limit))
    known = remembered(world.from_first(lambda: speed.recall(workspace, preset, name)), ladder, limit)
    if any(working(known[:1], device, world)):
        session, tried = settle(build, working(known, device, world), blocks, None, recorder, world)
        recorder.note(0, told(session.plan, tried, blocks, limit) + " As measured in an earlier run like this.")
        return session

    ladder = list(working(ladder, device, world))
    text_encoder = None
    if "text_encoder" in preset.adapter.targets:
        text_encoder = family.load_text_encoder(base, META, family.TEXT_DTYPE)
    estimate = Estimator(preset, skeleton, pick_dtype(preset, device), text_encoder=text_encoder, device=device,
                         processes=world.size)
    likely = worth_trying(ladder, estimate.fits, limit)
    session, tried = settle(build, likely, blocks, meter, recorder, world)
    recorder.note(0, told(session.plan, tried, blocks, limit))
    if world.first:
        speed.remember_plan(workspace, preset, name, session.plan, tried[session.plan], limit)
    return session


def remembered(known: dict[str, Any] | None, ladder: Sequence[Plan], limit: int) -> list[Plan]:
    """The ladder from the plan on that an earlier run like this found under such a limit; empty: measure."""
    try:
        plan, peak, before = Plan(**known["plan"]), known["peak"], known["limit"]
        fits = peak <= FULL * limit and limit <= LIKE * before and plan in ladder and known["ladder"] == LADDER
        return list(ladder[ladder.index(plan):]) if fits else []
    except (KeyError, TypeError):  # nothing is known, or a file that somebody else wrote
        return []


def _without_gpu(preset: Preset, blocks: int, device: torch.device, gpus: int) -> Plan:
    plan = plain(preset, blocks, gpus)
    if plan.offload_blocks:
        raise UserError(f"memory.offload_blocks = {plan.offload_blocks}: this run would train on a device without "
                        f"memory of its own ({device.type}), where that saves nothing; take it out")
    return plan
