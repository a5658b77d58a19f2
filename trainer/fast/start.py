"""What makes a run's steps faster, put in place before the first of them as far as preset, model and device allow."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping

import torch

from trainer.errors import first_line
from trainer.fast import attention, low_bits, passes
from trainer.fast import compile as block_compiler
from trainer.fast.graphs import CudaRecorder, StepGraphs
from trainer.fast.prefetch import Prefetcher
from trainer.schema import FLOW_FAMILIES
from trainer.session import Session

WORTH_STEPS = 40  # a graph saves some tens of milliseconds a step, and takes a second or two to record
TO_MAKE_ROOM = ("Steps take longer so; a smaller train.batch_size or memory.gradient_checkpointing = 'selective' or "
                "'full' makes room")  # which for a transformer costs more than graphs save
NOT_COMPILED = "The model's blocks are not compiled"
COMPILING = 30.0  # seconds that compiling a transformer's blocks takes, for each shape of batch
SAVES = 0.25  # of a step's time, when its blocks are compiled
PAYS = 3.0  # times its cost that compiling must save to be done unasked


def prepare(session: Session) -> None:
    """Let layers multiply in 8 bits, blocks be compiled, batches be read ahead and passes run as graphs; a note says
    why something that could be, is not."""
    attention.choose(session)  # before anything that is built on it
    obstacles = {low_bits.UNUSED: low_bits.choose(session), NOT_COMPILED: _compile(session)}
    for why_not, what in _by_reason(obstacles).items():
        session.recorder.note(session.progress.step, f"{what}: {why_not}")
    if session.device.type == "cuda":
        session.prefetch = Prefetcher(session.read, session.device)
    _record(session)


def _by_reason(obstacles: Mapping[str, str | None]) -> dict[str, str]:
    """What is not done, as a sentence, by what keeps a run from it, so that a reason for both is told once."""
    found: dict[str, str] = {}
    for what, why_not in obstacles.items():
        if why_not is not None:
            found[why_not] = f"{found[why_not]}, and {what[0].lower()}{what[1:]}" if why_not in found else what
    return found


def _record(session: Session) -> None:
    chosen = session.preset.memory.cuda_graphs
    if chosen == "off" or (chosen == "auto" and not worth_it(session)):
        return
    if (why_not := obstacle(session)) is not None:
        session.recorder.note(session.progress.step, f"CUDA graphs are not used: {why_not}")
        return
    session.graphs = StepGraphs(
        session.forward, session.backward, lambda: session.use("off"),
        [leaf.grad for leaf in session.adapter.parameters()], 0 if chosen == "on" else room(session),
        lambda text: session.recorder.note(session.progress.step, text), CudaRecorder(session.device),
        TO_MAKE_ROOM if is_unet(session) else "")


def finish(session: Session) -> None:
    """Let go of all that only steps need, so that pictures and measurements have the memory."""
    attention.release(session)
    if session.prefetch is not None:
        session.prefetch.close()
        session.prefetch = None
    if session.graphs is not None:
        session.graphs.drop()
        session.graphs = None


def _compile(session: Session) -> str | None:
    """Compile blocks as the preset says, or unasked where it pays; returns what keeps the run from it, in words."""
    chosen = session.preset.train.compile
    if chosen == "off" or (chosen == "auto" and not may_pay(session)):
        return None
    said = session.world.together(lambda: compile_obstacle(session))
    if (why_not := next(filter(None, said), None)) is not None:
        return why_not
    seconds = None if chosen == "on" else passes.unless_full(session, lambda: passes.seconds(session))
    if chosen == "on" or (seconds and pays(session, max(seconds))):
        _try_compiled(session)
    return None


def may_pay(session: Session) -> bool:
    """Whether compiling could be worth its time, before a step is measured: a transformer's blocks gain most. Where
    every bit counts, a resumed run must not decide anew."""
    preset, left = session.preset, session.steps - session.progress.step
    able = preset.model.family in FLOW_FAMILIES and session.device.type == "cuda"
    return able and not preset.train.deterministic and left >= 10 * WORTH_STEPS


def compile_obstacle(session: Session) -> str | None:
    """Why this run's blocks cannot be compiled, in words; None where nothing speaks against it."""
    if session.device.type != "cuda":
        return f"that needs an NVIDIA GPU, and this run trains on {session.device.type}"
    if session.offload is not None:
        return f"blocks of the model are fetched from {session.offload.SOURCE} at each step"
    if session.preset.adapter.dropout:
        return "adapter.dropout draws at random inside of a block"
    return block_compiler.compiler_missing()


def pays(session: Session, seconds: float) -> bool:
    """Whether compiling saves a multiple of what it costs, for steps of so many seconds."""
    shapes = len({session.latents.sizes[number] for number in session.latents.readable()})
    return (session.steps - session.progress.step) * seconds * SAVES >= PAYS * COMPILING * shapes


def _try_compiled(session: Session) -> None:
    """Compile, and take the coming step's passes once: what fails in one process, fails here, and the run goes on
    without in all."""
    session.recorder.phase("compiling the model's blocks")
    began = time.perf_counter()
    block_compiler.install(session.denoiser)
    try:
        session.world.together(lambda: passes.once(session))
    except low_bits.NOT_OURS:
        raise
    except Exception as error:
        traceback.print_exc()  # to the run's log
        reason = first_line(error)
    else:
        session.recorder.note(session.progress.step, "The model's blocks are compiled, which took "
                              f"{time.perf_counter() - began:.0f} s; another shape of batch takes as long, once")
        return
    block_compiler.remove(session.denoiser)
    passes.let_go(session)
    session.recorder.note(session.progress.step, f"{NOT_COMPILED}, since that failed: {reason}")


def worth_it(session: Session) -> bool:
    """Whether graphs are worth recording unasked: a UNet's hundreds of small kernels wait for the processor, and so do
    a transformer's where its blocks are compiled; its large ones by themselves do not."""
    many = is_unet(session) or block_compiler.is_installed(session.denoiser)
    return many and session.device.type == "cuda" and session.steps - session.progress.step >= WORTH_STEPS


def is_unet(session: Session) -> bool:
    """Whether the model is a UNet, not a transformer."""
    return session.preset.model.family not in FLOW_FAMILIES


def obstacle(session: Session) -> str | None:
    """Why this run's passes cannot be recorded, in words; None where nothing speaks against it."""
    if session.device.type != "cuda":
        return f"they need an NVIDIA GPU, and this run trains on {session.device.type}"
    if session.texts is None:
        return "prompts are encoded anew at each step, since the text encoder is trained"
    if session.preset.adapter.dropout:
        return "adapter.dropout draws at random inside of a step"
    if session.offload is not None:
        return f"blocks of the model are fetched from {session.offload.SOURCE} at each step"
    return None


def room(session: Session) -> int:
    """Bytes that tensors may take: the run's limit, or all that the GPU has."""
    return session.limit or torch.cuda.get_device_properties(session.device).total_memory
