"""What makes a run's steps faster, put in place before the first of them as far as preset, model and device allow."""

from __future__ import annotations

import torch

from trainer.fast.graphs import CudaRecorder, StepGraphs
from trainer.fast.prefetch import Prefetcher
from trainer.schema import FLOW_FAMILIES
from trainer.session import Session

WORTH_STEPS = 40  # a graph saves some tens of milliseconds a step, and takes a second or two to record


def prepare(session: Session) -> None:
    """Let batches be read ahead and passes run as graphs; a note says why something that could be, is not."""
    if session.device.type == "cuda":
        session.prefetch = Prefetcher(session.read, session.device)
    chosen = session.preset.memory.cuda_graphs
    if chosen == "off" or (chosen == "auto" and not worth_it(session)):
        return
    if (why_not := obstacle(session)) is not None:
        session.recorder.note(session.progress.step, f"CUDA graphs are not used: {why_not}")
        return
    session.graphs = StepGraphs(
        session.forward, session.backward, lambda: session.use("off"),
        [leaf.grad for leaf in session.adapter.parameters()], 0 if chosen == "on" else room(session),
        lambda text: session.recorder.note(session.progress.step, text), CudaRecorder(session.device))


def finish(session: Session) -> None:
    """Let go of all that only steps need, so that pictures and measurements have the memory."""
    if session.prefetch is not None:
        session.prefetch.close()
        session.prefetch = None
    if session.graphs is not None:
        session.graphs.drop()
        session.graphs = None


def worth_it(session: Session) -> bool:
    """Whether graphs are worth recording unasked: a UNet's hundreds of small kernels wait for the processor, a
    transformer's large ones do not."""
    unet = session.preset.model.family not in FLOW_FAMILIES
    return unet and session.device.type == "cuda" and session.steps - session.progress.step >= WORTH_STEPS


def obstacle(session: Session) -> str | None:
    """Why this run's passes cannot be recorded, in words; None where nothing speaks against it."""
    if session.device.type != "cuda":
        return f"they need an NVIDIA GPU, and this run trains on {session.device.type}"
    if session.texts is None:
        return "prompts are encoded anew at each step, since the text encoder is trained"
    if session.preset.adapter.dropout:
        return "adapter.dropout draws at random inside of a step"
    if session.offload is not None:
        return "blocks of the model are fetched from the computer's memory at each step"
    return None


def room(session: Session) -> int:
    """Bytes that tensors may take: the run's limit, or all that the GPU has."""
    return session.limit or torch.cuda.get_device_properties(session.device).total_memory
