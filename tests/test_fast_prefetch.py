"""Batches that are read ahead are those that would have been read, in whatever order they are asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from tests import projects
from trainer.data.order import Draw
from trainer.errors import UserError
from trainer.fast.prefetch import AHEAD, Prefetcher

CPU = torch.device("cpu")


def draws_of(number: int) -> list[Draw]:
    return [Draw(number, number, 0, False, 0)]


class Source:
    """Reads a batch of one number, and keeps who asked."""

    def __init__(self) -> None:
        self.read: list[tuple[int, str]] = []

    def __call__(self, draws: list[Draw]) -> dict[str, torch.Tensor]:
        self.read.append((draws[0].item, threading.current_thread().name))
        if draws[0].item == 13:
            raise UserError("the cache lost an entry")
        return {"latents": torch.tensor([draws[0].item])}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_come_from_the_thread_each_read_once_and_in_order() -> None:
    source = Source()
    prefetch = Prefetcher(source, CPU)
    taken = []
    for number in range(6):
        taken.append(prefetch.take(draws_of(number))["latents"].item())
        prefetch.send_for([draws_of(later) for later in range(number + 1, 6)])
    prefetch.close()
    assert taken == list(range(6))
    assert [number for number, _ in source.read] == list(range(6))
    assert all(name.startswith("prefetch") for _, name in source.read[1:])


def test_no_more_is_read_ahead_than_agreed() -> None:
    source = Source()
    prefetch = Prefetcher(source, CPU)
    prefetch.send_for([draws_of(number) for number in range(10)])
    prefetch.close()
    assert len(source.read) <= AHEAD


def test_a_batch_that_was_not_sent_for_is_read_at_once_and_an_unwanted_one_let_go() -> None:
    source = Source()
    prefetch = Prefetcher(source, CPU)
    prefetch.send_for([draws_of(1), draws_of(2)])
    assert prefetch.take(draws_of(7))["latents"].item() == 7
    prefetch.send_for([draws_of(8)])
    assert list(prefetch.coming) == [tuple(draws_of(8))]
    prefetch.close()


def test_what_a_read_raises_is_raised_where_the_batch_is_taken() -> None:
    prefetch = Prefetcher(Source(), CPU)
    prefetch.send_for([draws_of(13)])
    with pytest.raises(UserError, match="lost an entry"):
        prefetch.take(draws_of(13))
    prefetch.close()


def test_closing_leaves_no_thread_and_reading_goes_on_without() -> None:
    before, source = threads(), Source()
    prefetch = Prefetcher(source, CPU)
    prefetch.send_for([draws_of(1)])
    prefetch.close()
    prefetch.send_for([draws_of(2)])
    assert threads() == before
    assert prefetch.take(draws_of(3))["latents"].item() == 3


def test_a_session_that_reads_ahead_has_the_same_gradients(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path, "train.grad_accum=2", "train.batch_size=1")
    found = []
    for ahead in (False, True):
        session.prefetch = Prefetcher(session.read, CPU) if ahead else None
        for step in range(3):
            session.gradients(session.order.batch(step), coming=session.order.batch(step + 1))
        found.append([leaf.grad.clone() for leaf in session.adapter.parameters()])
        session.adapter.zero_grad()
    assert len(session.prefetch.coming) == AHEAD
    session.prefetch.close()
    for plain, ahead in zip(*found):
        assert torch.equal(plain, ahead)
