"""Changes how a session holds its model while the adapter and everything else stay as they are."""

from __future__ import annotations

from dataclasses import asdict

from trainer import gpu
from trainer.errors import UserError
from trainer.memory.blocks import repeated_blocks
from trainer.memory.meter import GIB
from trainer.memory.plan import Plan, below
from trainer.session import Session, find_targets, hold, models_by_name


def change(session: Session, plan: Plan) -> None:
    """Hold the session's model as `plan` says; weights are loaded anew when they are to be quantised otherwise."""
    if session.offload is not None:
        session.offload.remove()
        session.offload = None
    if plan.quantize != session.plan.quantize:
        session.adapter.remove()
        session.denoiser = None  # its memory goes before that of the new one comes
        gpu.free_memory()
        session.denoiser = session.family.load_denoiser(session.base, session.device, session.dtype, plan.quantize)
        session.adapter.move(find_targets(session.preset, models_by_name(
            session.family, session.denoiser, session.text_encoder)))
    session.offload = hold(session.family, session.denoiser, plan, session.device)
    session.plan, session.progress.plan = plan, asdict(plan)


def step_down(session: Session) -> None:
    """After a step that did not fit: hold the model in the next more sparing way, so that the step can be done again.

    The quantisation stays as long as anything else can give way, so that the run goes on with the model it began
    with.  Raises `UserError` when there is nothing more to save.
    """
    gpu.free_memory()
    session.adapter.zero_grad()
    step, blocks = session.progress.step + 1, len(repeated_blocks(session.denoiser))
    lower = below(session.preset, blocks, session.plan)
    if not lower:
        raise UserError(f"step {step} does not fit into the GPU's memory, and nothing more can be saved with "
                        f"{session.plan.in_words(blocks)}: make data.resolution or train.batch_size smaller in a new "
                        "run, or close other programs that use the GPU and resume this one")
    before, plan = session.plan, lower[0]
    change(session, plan)
    room = f" of {session.limit / GIB:.1f} GiB" if session.limit else ""
    session.recorder.note(session.progress.step, f"Step {step} did not fit into the GPU's memory{room} with "
                          f"{before.in_words(blocks)}. It is done again with {plan.in_words(blocks)}")
