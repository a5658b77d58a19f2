"""Passes of coming steps that leave nothing behind: what they and their parts take, and the gradients they give."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from trainer.data.order import share, stream
from trainer.faults import out_of_memory
from trainer.gpu import free_memory
from trainer.session import Session

T = TypeVar("T")
WARM, TIMED = 2, 5  # calls of what is timed by itself, before and meanwhile


def once(session: Session) -> None:
    """The coming step's passes, of which nothing stays."""
    try:
        session.gradients(session.order.batch(session.progress.step))
    finally:
        session.adapter.zero_grad()


def unless_full(session: Session, work: Callable[[], T]) -> list[T] | None:
    """What all processes find out before the steps; None where memory ran out in one of them: the first step will find
    that out too, and hold the model in a more sparing way."""
    try:
        return session.world.together(work)
    except Exception as error:
        if not out_of_memory(error):
            raise
    let_go(session)
    return None


def let_go(session: Session) -> None:
    """After passes that failed: free what layers still have of them."""
    session.use("off")
    free_memory()


def seconds(session: Session) -> float:
    """What a step's passes take; the second of two, since the first loads libraries."""
    for _ in range(2):
        torch.cuda.synchronize(session.device)
        began = time.perf_counter()
        once(session)
        torch.cuda.synchronize(session.device)
    return time.perf_counter() - began


def clocked(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call of a small part of a pass, by the device's clock: the mean of several, after some to warm."""
    for _ in range(WARM):
        work()
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(TIMED):
            work()
        return (time.perf_counter() - began) / TIMED
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(TIMED):
        work()
    ended.record()
    torch.cuda.synchronize(device)
    return began.elapsed_time(ended) / 1000 / TIMED


def gradients(session: Session, steps: int) -> list[list[Tensor]]:
    """The adapter's gradients in so many coming steps, with the same dropout each time this is asked."""
    found = []
    with torch.random.fork_rng([session.device] if session.device.type == "cuda" else []):
        for step in range(session.progress.step, session.progress.step + steps):
            torch.manual_seed(stream(session.preset.train.seed, step, "dropout"))
            try:
                session.gradients(session.order.batch(step))
                found.append([leaf.grad.clone() for leaf in session.adapter.parameters()])
            finally:
                session.adapter.zero_grad()
    return found


def first_forward(session: Session) -> None:
    """The forward pass of the run's very first micro-batch, which a resumed run takes alike."""
    draws = share(session.order.batch(0), session.world.rank, session.world.size, 0, session.preset.train.grad_accum)
    try:
        with torch.no_grad():
            session.use("raw")
            session.loss(draws)
    finally:
        session.use("off")


def rows_of_inputs(session: Session, paths: frozenset[str]) -> dict[str, int]:
    """How many rows the inputs of layers have in the first forward pass, by the layers' paths."""
    rows: dict[str, int] = {}
    hooks = [session.denoiser.get_submodule(path).register_forward_pre_hook(
        lambda layer, given, path=path: rows.__setitem__(path, given[0].numel() // given[0].shape[-1]))
        for path in sorted(paths)]
    try:
        first_forward(session)
    finally:
        for hook in hooks:
            hook.remove()
    return rows
