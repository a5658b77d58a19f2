"""Changes how a session holds its model while the adapter and everything else stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch

from trainer import gpu, speed
from trainer.distributed import World
from trainer.errors import UserError
from trainer.fast import compile as block_compiler
from trainer.fast import matmul
from trainer.faults import out_of_memory
from trainer.memory.blocks import repeated_blocks
from trainer.memory.meter import GIB
from trainer.memory.offload import Offload
from trainer.memory.plan import Plan, below
from trainer.quantize.available import works
from trainer.session import Session, find_targets, hold, load, models_by_name

COMPILED = "compiled blocks"


def change(session: Session, plan: Plan) -> None:
    """Hold the session's model as `plan` says; weights are loaded anew when they are to be quantised, or shared by
    GPUs, otherwise."""
    if session.denoiser is not None and (plan.quantize, plan.shards) != (session.plan.quantize, session.plan.shards):
        let_go(session)
    if session.denoiser is None:
        session.denoiser, session.offload = load(session.family, session.base, session.device, session.dtype, plan,
                                                 session.neighbours)
        session.adapter.move(find_targets(session.preset, models_by_name(
            session.family, session.denoiser, session.text_encoder)))
        _multiply_alike(session, plan)
    elif isinstance(session.offload, Offload):
        session.offload.remove(to_device=not plan.offload_blocks)  # all at once may be what does not fit
        session.offload = None
    session.offload = hold(session.family, session.denoiser, plan, session.device) or session.offload
    session.plan, session.progress.plan = plan, asdict(plan)


def reload(session: Session) -> None:
    """Have the model's weights anew, as they were before anything was done with them."""
    let_go(session)
    change(session, session.plan)


def _multiply_alike(session: Session, plan: Plan) -> None:
    """Let weights that were loaded anew multiply in 8 bits as those before, where they can."""
    low = session.low_bits
    if low is None:
        return
    if plan.quantize in ("none", low.kind) and session.offload is None:
        matmul.install(session.denoiser, low)
        return
    session.low_bits, session.progress.matmul = None, "off"
    session.recorder.note(session.progress.step, "Frozen layers do not multiply in 8 bits from here on, since the "
                          "model is held in another way")


def working(plans: Iterable[Plan], device: torch.device, world: World) -> Iterator[Plan]:
    """The plans whose weights the devices of all processes can hold; each is asked for when its turn comes, since that
    takes a second."""
    return (plan for plan in plans if all(world.together(lambda plan=plan: works(plan.quantize, device))))


def graphs_recorded(session: Session) -> bool:
    """Whether CUDA graphs keep memory that something else could have."""
    return session.graphs is not None and bool(session.graphs.captured)


def step_down(session: Session) -> None:
    """After a step that did not fit: hold the model in the next more sparing way, so that the step can be done again.

    The quantisation stays as long as anything else can give way, so that the run goes on with the model it began
    with.  Raises `UserError` when there is nothing more to save.
    """
    gpu.free_memory()
    session.adapter.zero_grad()
    if any(session.world.together(lambda: graphs_recorded(session))):
        if session.graphs is not None:
            session.graphs.stop(f"CUDA graphs are not used any more: step {session.progress.step + 1} did not fit into "
                                "the GPU's memory beside them, and is done again without")
        return
    before, blocks = session.plan, len(repeated_blocks(session.denoiser))
    failed = f"Step {session.progress.step + 1} did not fit into the GPU's memory"
    lost = _give_up(session)
    without = " and ".join(lost)
    if COMPILED in lost and before.checkpointing == "selective":  # of which the compiler knows nothing
        session.recorder.note(session.progress.step, f"{failed} with {COMPILED}. It is done again, and the run goes "
                              f"on, without {without}: so the blocks hold less")
        return
    if session.limit:
        failed += f", of which the run may take {session.limit / GIB:.1f} GiB,"
    for plan in working(below(session.preset, blocks, before, session.gpus), session.device, session.world):
        if _can(session, plan):
            break
    else:
        raise UserError(f"{failed} with {before.in_words(blocks)}, and nothing more can be saved. Close other programs "
                        "that use the GPU and resume this run, or make data.resolution or train.batch_size smaller "
                        "in a new one")
    session.recorder.note(session.progress.step, f"{failed} with {before.in_words(blocks)}. It is done again, and the "
                          f"run goes on, with {plan.in_words(blocks)}" + (f", without {without}" if lost else ""))
    if session.limit and session.world.first:  # so that the next run like this begins here
        name = speed.device_name(session.device, session.world.size)
        speed.remember_plan(session.cache.root.parent, session.preset, name, plan, 0, session.limit)


def _give_up(session: Session) -> list[str]:
    """Let go of what makes steps faster and may take memory; says what there was of it."""
    graphs = session.graphs is not None and session.graphs.on
    session.graphs = None
    compiled = any(session.world.together(lambda: block_compiler.remove(session.denoiser)))
    return [name for name, was_there in ((COMPILED, compiled), ("CUDA graphs", graphs)) if was_there]


def _can(session: Session, plan: Plan) -> bool:
    """Whether there is memory enough to change to the plan."""
    try:
        session.world.together(lambda: change(session, plan))
        return True
    except Exception as error:
        if not out_of_memory(error):
            raise
    let_go(session)
    return False


def let_go(session: Session) -> None:
    """Forget the denoiser, so that its memory is free before another one comes; a text encoder stays, without the
    adapter."""
    if session.denoiser is not None:
        session.adapter.remove()
    session.denoiser, session.offload = None, None
    gpu.free_memory()
