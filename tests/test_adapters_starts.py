"""The starts of every method against their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import METHODS, adapted, targets_of
from trainer import manifold
from trainer.adapters import METHODS as KINDS
from trainer.adapters.stella import rank_budget
from trainer.schema import METHOD_INITS


def singular(target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.linalg.svd(target.module.weight.detach().flatten(1).double(), full_matrices=False)


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return up.flatten(1).double() @ down.flatten(1).double()


def trained_part(adapter, number: int) -> torch.Tensor:
    """up @ down of a layer without the frozen start pair."""
    pair = adapter.method.pair(adapter.leaves)
    return (adapter.layout.slot(pair, "up", number) @ adapter.layout.slot(pair, "down", number).t()).detach().double()


@pytest.mark.parametrize("method", METHODS)
def test_the_schema_offers_exactly_the_starts_there_are(method):
    assert set(METHOD_INITS[method]) == set(KINDS[method].inits)


@pytest.mark.parametrize("method, init", [(m, i) for m in ("stella", "trilora") for i in KINDS[m].inits])
@pytest.mark.parametrize("diagonal", [False, True])
def test_three_factors_start_orthonormal_with_an_identity_or_zero_core(method, init, diagonal):
    adapter = adapted(method, init=init, diagonal_s=diagonal)[1]
    for stack in adapter.method.factors(adapter.leaves).values():
        assert manifold.orthogonality_error(stack.detach()) <= 1e-6
    core = torch.ones(3) if diagonal else torch.eye(3)
    assert torch.equal(adapter.leaves["core"][2], torch.zeros_like(core) if init in ("default", "zero") else core)


@pytest.mark.parametrize("init", ["svd-major", "svd-minor"])
def test_svd_starts_take_the_outer_singular_vectors(init):
    adapter = adapted("stella", init=init)[1]
    for number, target in enumerate(adapter.layout.targets):
        left, _, right = singular(target)
        part = slice(0, 3) if init == "svd-major" else slice(-3, None)
        assert (trained_part(adapter, number) - left[:, part] @ right[part]).abs().max() <= 1e-5


def test_pissa_trains_the_principal_part_of_the_weight():
    adapter = adapted("lora", init="pissa")[1]
    for number, target in enumerate(adapter.layout.targets):
        left, values, right = singular(target)
        assert (trained_part(adapter, number) - left[:, :3] * values[:3] @ right[:3]).abs().max() <= 1e-5
        up = adapter.layout.slot(adapter.leaves, "up", number).detach()
        assert torch.allclose(up.norm(dim=0).double(), values[:3].sqrt(), atol=1e-5)


def test_olora_trains_the_first_part_of_qr():
    adapter = adapted("lora", init="olora")[1]
    for number, target in enumerate(adapter.layout.targets):
        q, r = torch.linalg.qr(target.module.weight.detach().flatten(1).double())
        assert (trained_part(adapter, number) - q[:, :3] @ r[:3]).abs().max() <= 1e-5


@pytest.mark.parametrize("method, init", [("lora", "pissa"), ("lora", "olora"), ("stella", "pseudo-zero")])
def test_starts_that_split_the_weight_change_nothing_together_with_their_frozen_part(method, init):
    adapter = adapted(method, init=init)[1]
    for _, up, down, _ in adapter.pairs():
        assert up.shape[1] == 6
        assert product(up, down).abs().max() <= 1e-7


def test_lora_starts_with_the_papers_uniform_down():
    adapter = adapted("lora")[1]
    for number, target in enumerate(targets_of(adapted("lora")[0])):
        down = adapter.layout.slot(adapter.leaves, "down", number)
        bound = target.columns**-0.5
        assert 0.8 * bound < down.abs().max() <= bound
        assert adapter.layout.slot(adapter.leaves, "up", number).abs().max() == 0


def test_large_matrices_get_the_same_leading_part_by_power_iterations(monkeypatch):
    from trainer.adapters import lora

    weight = torch.randn(60, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = lora.leading_svd(weight, 4)
    monkeypatch.setattr(lora, "FULL_SVD_SIZE", 10)
    fast = lora.leading_svd(weight, 4)
    assert torch.allclose(exact[0] * exact[1] @ exact[2], fast[0] * fast[1] @ fast[2], atol=1e-4)


def test_the_rank_budget_falls_once_from_the_rank_to_the_target():
    budget = [rank_budget(step, 100, 8, 3.0) for step in range(100)]
    assert budget[:21] == [8.0] * 21 and budget[70:] == [3.0] * 30
    assert budget == sorted(budget, reverse=True)
    assert budget[45] == pytest.approx(3 + 5 / 8)
