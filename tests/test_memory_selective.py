"""Selective checkpointing: every family's gradients to the bit, in every way of training, with far less kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.bench import step_time, true_size
from trainer.memory import selective
from trainer.memory.estimate import Estimator
from trainer.memory.plan import Plan
from trainer.session import Session

CASES = [("sd15:2", "stella", ()), ("sdxl:1", "lora", ("adapter.dora=true",)), ("flux1-dev:2", "stiefel", ()),
         ("klein-4b:2", "stella", ("adapter.dropout=0.2",)), ("klein-4b:1:none:fp8", "lora", ()),
         ("sd15:1:none:int8", "lora", ('adapter.targets=["all"]',)),
         ("flux1-dev:1", "lora", ('adapter.targets=["feed_forward"]', "adapter.fuse_qkv=false"))]


def tiny(case: str, method: str, changes: tuple[str, ...], dtype: torch.dtype = torch.float32
         ) -> tuple[Session, true_size.Size]:
    """A session with a small model of a case's topology, whose adapter is no longer as at the start."""
    [row] = step_time.rows_of(case, [method])
    size, device = true_size.shrunk(true_size.SIZES[row.size]), torch.device("cpu")
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, row.quantize, device, dtype)
    session = step_time.session_of(size, method, changes, denoiser, device, dtype, row)
    for number, leaf in enumerate(session.adapter.parameters()):  # where some gradients are 0
        leaf.data += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(number))
    return session, size


def gradients(session: Session, size: true_size.Size) -> list[Tensor]:
    torch.manual_seed(1)  # of dropout
    loss = session.gradients(true_size.draws(size, 0))
    found = [loss, *(leaf.grad.clone() for leaf in session.adapter.parameters())]
    session.adapter.zero_grad()
    return found


@pytest.mark.parametrize(("case", "method", "changes"), CASES, ids=lambda part: str(part))
def test_gradients_are_those_without_checkpointing_to_the_bit(case: str, method: str, changes: tuple[str, ...]) -> None:
    session, size = tiny(case, method, changes)
    plain = gradients(session, size)
    assert all(found.abs().max() > 0 for found in plain)
    kinds = [type(module) for module in session.denoiser.modules()]
    selective.install(session.denoiser)
    selective.install(session.denoiser)  # as when a plan is taken twice
    assert all(map(torch.equal, plain, gradients(session, size)))
    with torch.no_grad():  # as pictures are drawn
        drawn = session.loss(true_size.draws(size, 0))
    selective.remove(session.denoiser)
    assert [type(module) for module in session.denoiser.modules()] == kinds
    with torch.no_grad():
        assert torch.equal(session.loss(true_size.draws(size, 0)), drawn)


def test_a_true_size_holds_little_more_than_half() -> None:
    size = true_size.SIZES["klein-4b"]
    estimate = Estimator(true_size.preset_of(size, "stella", 16), true_size.skeleton(size), torch.bfloat16)
    none, some, full = (estimate(Plan(checkpointing=level)).step for level in ("none", "selective", "full"))
    assert 0.5 * none < some < 0.6 * none and full < 0.3 * some
