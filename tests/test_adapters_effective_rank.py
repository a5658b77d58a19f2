"""Effective rank, spectrum and drift against whole matrices and known spectra."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import METHODS, OPTIMIZER, adapted, train, trained
from trainer.adapters.effective_rank import entropy_rank, measure, singular_values, stable_rank
from trainer.optim import build_optimizer


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_singular_values_are_those_of_the_whole_matrix(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(2, dim, rank, dtype=torch.float64, generator=generator) for dim in (30, 20))
    values = singular_values(up.mT @ up, down.mT @ down)
    whole = torch.linalg.svdvals(up @ down.mT)[:, :rank]
    assert torch.allclose(values, whole, rtol=1e-6, atol=1e-6)


def test_ranks_of_known_spectra():
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0]])
    entropy = -(2 / 3 * torch.tensor(2 / 3).log() + 1 / 3 * torch.tensor(1 / 3).log())
    assert torch.allclose(entropy_rank(values), torch.stack([torch.tensor(4.0), torch.tensor(1.0), torch.tensor(0.0),
                                                             entropy.exp()]))
    assert torch.allclose(stable_rank(values), torch.tensor([4.0, 1.0, 0.0, 1.25]))


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_of_each_group_are_those_of_its_deltas(method):
    net, adapter = trained(method, 8)
    facts = measure(adapter)
    for group, count in {"Conv2d": 1, "Linear": 3}.items():
        deltas = [adapter.delta(target.name) for target in adapter.layout.targets if target.group == group]
        values = torch.stack([torch.linalg.svdvals(delta)[:3] for delta in deltas])
        assert len(values) == count
        assert facts["erank"][group] == pytest.approx(float(entropy_rank(values).mean()), abs=1e-4)
        assert facts["stable"][group] == pytest.approx(float(stable_rank(values).mean()), abs=1e-4)
        assert facts["norm"][group] == pytest.approx(float(values.square().sum(1).sqrt().mean()), abs=1e-5)
        mean = values.mean(0)  # the tiny net's layers are in no block, so that each group stands for one
        assert facts["spectrum"][group] == pytest.approx((mean / mean[0]).tolist(), rel=1e-3)
        numbers = [facts[name][group] for name in ("erank", "stable", "norm")]
        assert facts["blocks"][group] == pytest.approx(numbers, rel=1e-3)
    assert (facts["orth_error"] is None) == (method in ("lora", "trilora"))
    assert facts["orth_error"] is None or facts["orth_error"] <= 1e-6
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("method, init", [("lora", "default"), ("lora", "pissa"), ("stiefel", "default"),
                                          ("stella", "zero"), ("stella", "pseudo-zero")])
def test_no_change_has_rank_zero_and_no_drift(method, init):
    facts = measure(adapted(method, init=init)[1])
    assert set(facts["erank"].values()) == set(facts["norm"].values()) == {0.0}
    assert {value for spectrum in facts["spectrum"].values() for value in spectrum} == {0.0}
    assert max(facts["drift"].values()) <= 1e-3
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("method", METHODS)
def test_drift_is_the_turn_of_the_subspaces_since_the_start(method):
    net, adapter = adapted(method)
    start = {key: stack.detach().clone() for key, stack in adapter.pair_stacks().items()}
    train(net, adapter, build_optimizer(OPTIMIZER[method], adapter, lr=3e-2), range(20))
    now, drifts = adapter.pair_stacks(), []
    for kind in ("up", "down"):
        before, after = adapter.layout.slot(start, kind, 0), adapter.layout.slot(now, kind, 0)
        if before.abs().max() > 0:
            q0, q = torch.linalg.qr(before.double())[0], torch.linalg.qr(after.detach().double())[0]
            drifts.append(1 - float((q0.t() @ q).square().sum()) / 3)
    assert measure(adapter)["drift"]["Conv2d"] == pytest.approx(sum(drifts) / len(drifts), abs=2e-3)
    assert sum(drifts) > 0.003
