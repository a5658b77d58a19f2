"""Optimizers, schedules and clipping."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import adapted, take_step, train
from trainer import adapters, manifold, optim
from trainer.adapters.target import Target
from trainer.errors import UserError


def filled_grads(adapter, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)  # not the seed of the starts
    for leaf in adapter.parameters():
        leaf.grad.copy_(torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype))
    return {key: leaf.detach().clone() for key, leaf in adapter.leaves.items()}


def step(adapter, optimizer) -> None:
    adapter.before_step()
    optimizer.step()
    adapter.after_step()


def test_schedules_warm_up_and_end_as_named():
    for name, middle, end in (("constant", 1, 1), ("cosine", 0.5, 0), ("linear", 0.5, 0)):
        factor = optim.build_schedule(name, 110, 10)
        assert [factor(0), factor(4), factor(9), factor(10)] == [0.1, 0.5, 1.0, 1.0]
        assert factor(60) == pytest.approx(middle)
        assert factor(110) == pytest.approx(end)
    assert optim.build_schedule("cosine", 100)(25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    with pytest.raises(UserError, match="no schedule 'cosin'"):
        optim.build_schedule("cosin", 10)


def test_clipping_scales_down_but_never_up():
    adapter = adapted("lora")[1]
    filled_grads(adapter)
    norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in adapter.parameters()))
    assert float(optim.clip_grad_norm(adapter.parameters(), 0)) == pytest.approx(norm, rel=1e-5)
    optim.clip_grad_norm(adapter.parameters(), 2 * norm)
    optim.clip_grad_norm(adapter.parameters(), norm / 4)
    assert float(optim.clip_grad_norm(adapter.parameters(), 0)) == pytest.approx(norm / 4, rel=1e-4)


def test_weight_decay_reaches_free_factors_only():
    for method, free in {"lora": {"up", "down"}, "stiefel": {"down"}, "stella": {"core"},
                         "trilora": {"factor", "core"}}.items():
        optimizer = optim.build_optimizer("adamw", adapted(method, dora=True)[1], lr=1.0, weight_decay=0.1)
        assert {group["role"] for group in optimizer.param_groups if group["weight_decay"]} == free


def test_decay_of_an_orthonormal_factor_would_do_nothing():
    ends = []
    for decay in (0.0, 0.5):
        net, adapter = adapted("stella", dtype=torch.float64)
        optimizer = optim.build_optimizer("adamw", adapter, lr=1e-2)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay if group["role"] == "factor" else 0.0
        train(net, adapter, optimizer, range(10))
        ends.append(adapter.leaves["factor.72"].detach().clone())
    assert torch.allclose(*ends, atol=1e-10)


def test_gradient_scaling_turns_columns_of_every_size_alike():
    adapter = adapted("stella", scale_dim=40.0)[1]
    before = filled_grads(adapter)
    step(adapter, optim.build_optimizer("adamw", adapter, lr=1e-4))
    for key, leaf in adapter.on_manifold().items():
        turn = (leaf.detach() - before[key]).norm(dim=1).mean()
        assert float(turn) == pytest.approx(1e-4 * math.sqrt(40), rel=0.12)  # the projection takes a little


def test_the_default_scale_dim_is_the_median_size_and_zero_is_off():
    assert adapted("stella")[1].step_rule.scale_dim == 10
    assert adapted("stella", scale_dim=0.0)[1].step_rule.scale(72) == 1.0


def test_stiefel_moves_b_by_its_rms_and_a_by_the_sign():
    adapter = adapted("stiefel", dtype=torch.float64)[1]
    before = filled_grads(adapter)
    step(adapter, optim.build_optimizer("stiefel", adapter, lr=1e-4))
    for key, leaf in adapter.leaves.items():
        moved = leaf - before[key]
        assert moved.square().mean((1, 2)).sqrt().tolist() == pytest.approx([2e-5] * len(leaf), rel=1e-3)
        if key.startswith("down."):
            assert torch.equal(moved.sign(), -leaf.grad.sign())


def test_stiefel_decay_follows_the_schedule_and_the_rank_not_the_rate():
    for lr in (1e-2, 1e-6):
        adapter = adapted("stiefel", dtype=torch.float64)[1]
        adapter.leaves["down.72"].data.fill_(1.0)
        optimizer = optim.build_optimizer("stiefel", adapter, lr=lr, weight_decay=0.3)
        optim.set_lr(optimizer, lr / 2)
        step(adapter, optimizer)
        assert torch.allclose(adapter.leaves["down.72"], torch.tensor(1 - 0.3 / 3 / 2, dtype=torch.float64))


def test_paper_form_of_stiefel_keeps_b_orthonormal_under_any_optimizer():
    for name in ("adamw", "adamw8bit", "sgd"):
        net, adapter = adapted("stiefel", rank=4)
        before = adapter.leaves["up.10"].detach().clone()
        train(net, adapter, optim.build_optimizer(name, adapter, lr=1e-2), range(10))
        assert manifold.orthogonality_error(adapter.leaves["up.10"]) <= 1e-6
        assert (adapter.leaves["up.10"] - before).abs().max() > 1e-4


def test_lora_plus_gives_up_its_own_rate():
    adapter = adapted("lora", dtype=torch.float64)[1]
    before = filled_grads(adapter)
    optimizer = optim.build_optimizer("adamw", adapter, lr=1e-3, up_lr_ratio=16)
    optim.set_lr(optimizer, 1e-4)
    step(adapter, optimizer)
    moved = {key.split(".")[0]: (leaf - before[key]).abs().mean().item() for key, leaf in adapter.leaves.items()}
    assert moved == pytest.approx({"up": 16e-4, "down": 1e-4}, rel=1e-3)


def test_scaled_adamw_preconditions_each_factor_by_the_other():
    adapter = adapted("lora", dtype=torch.float64)[1]
    with torch.no_grad():
        for leaf in adapter.parameters():
            leaf.add_(torch.randn_like(leaf))
    filled_grads(adapter)
    layout, leaves = adapter.layout, adapter.leaves
    grads = {key: leaf.grad.clone() for key, leaf in leaves.items()}
    optim.build_optimizer("scaled_adamw", adapter, lr=1e-3)
    adapter.before_step()
    after = {key: leaf.grad for key, leaf in leaves.items()}
    for number in range(len(layout.targets)):
        for kind, other in (("up", "down"), ("down", "up")):
            factor = layout.slot(leaves, other, number)
            metric = factor.t() @ factor + 1e-6 * torch.eye(3, dtype=torch.float64)
            restored = layout.slot(after, kind, number) @ metric
            assert torch.allclose(restored, layout.slot(grads, kind, number), atol=1e-8)


def test_eight_bit_states_are_kept_through_a_resume():
    from torch import nn

    from trainer.adapters import Target, build

    ends = []
    for parts in ([6], [3, 3]):
        saved = None
        for count in parts:
            adapter = build([Target("wide", nn.Linear(4096, 600), "g")], method="stella", rank=4)
            optimizer = optim.build_optimizer("adamw8bit", adapter, lr=1e-3)
            if saved:
                adapter.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            for seed in range(count):
                filled_grads(adapter, seed + (0 if saved is None else 3))
                step(adapter, optimizer)
            saved = [{key: tensor.clone() for key, tensor in part.state_dict().items()}
                     for part in (adapter, optimizer)]
        assert any(tensor.dtype == torch.uint8 for tensor in saved[1].values())
        ends.append(saved)
    for a, b in zip(*ends):
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("method, name, message", [
    ("stella", "prodigy", "keeps its own copy of the weights"),
    ("stiefel", "schedule-free", "keeps its own copy of the weights"),
    ("lora", "adam", "no optimizer 'adam'"),
    ("lora", "stiefel", "is the step of adapter.method = 'stiefel'"),
    ("stella", "scaled_adamw", "go with adapter.method = 'lora' only"),
])
def test_an_optimizer_that_cannot_go_with_the_method_is_a_plain_error(method, name, message):
    with pytest.raises(UserError, match=message):
        optim.build_optimizer(name, adapted(method)[1], lr=1e-3)


def test_bitsandbytes_that_cannot_be_loaded_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes.*or use adamw"):
        optim.build_optimizer("adamw8bit", adapted("lora")[1], lr=1e-3)


def test_the_8_bit_states_of_large_stacks_stay_in_8_bits_over_a_resume():
    def begin() -> tuple[torch.nn.Module, adapters.Adapter, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(96, 96, bias=False) for _ in range(6)))
        adapter = adapters.build([Target(str(i), layer, "x") for i, layer in enumerate(net)], method="stella", rank=8)
        adapter.install()
        return net, adapter, optim.build_optimizer("adamw8bit", adapter, lr=1e-2)

    def advance(net: torch.nn.Module, adapter: adapters.Adapter, optimizer: torch.optim.Optimizer, steps: range):
        for step in steps:
            adapter.refresh()
            loss = net(torch.randn(4, 96, generator=torch.Generator().manual_seed(step))).square().mean()
            loss.backward()
            take_step(adapter, optimizer, loss)

    whole, broken, resumed = begin(), begin(), begin()
    advance(*whole, range(6))
    advance(*broken, range(3))
    for kept, part in zip(broken[1:], resumed[1:]):
        part.load_state_dict({key: tensor.clone() for key, tensor in kept.state_dict().items()})
    advance(*resumed, range(3, 6))
    states = {key: value for key, value in resumed[2].state_dict().items() if key.startswith("0.0.state")}
    assert len(states) == 2 and all(value.dtype == torch.uint8 for value in states.values())
    assert all(map(torch.equal, whole[1].parameters(), resumed[1].parameters()))
