"""The bank: layers, leaves, guard, averages, and the errors a user can make."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import METHODS, OPTIMIZER, adapted, batch, take_step, targets_of, train, trained
from trainer import manifold
from trainer.adapters import Target, build
from trainer.errors import UserError
from trainer.optim import build_optimizer

NAMES = ["net.conv", "net.first", "net.second", "net.third"]


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_adds_exactly_its_delta(method):
    net, adapter = trained(method)
    adapter.refresh()
    for target in adapter.layout.targets:
        x = batch(3) if target.convolution else torch.randn(4, target.columns)
        weight = target.module.weight + adapter.delta(target.name).view_as(target.module.weight).float()
        plain = nn.functional.conv2d(x, weight, target.module.bias, 2, 1) if target.convolution \
            else nn.functional.linear(x, weight, target.module.bias)
        assert (target.module(x) - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_names_of_the_model_do_not_change(method):
    net, adapter = trained(method)
    assert set(net.state_dict()) == set(type(net)().state_dict())
    adapter.remove()
    assert {type(module) for module in net.modules()} <= {type(net), nn.Linear, nn.Conv2d}
    adapter.install()


@pytest.mark.parametrize("method", METHODS)
def test_off_is_the_base_model_to_the_bit(method):
    net, adapter = trained(method)
    adapter.refresh("off")
    assert torch.equal(net(batch(1)), type(net)()(batch(1)))


@pytest.mark.parametrize("method", ["lora", "stiefel"])
def test_lora_and_stiefel_start_as_the_base_model(method):
    net, adapter = adapted(method)
    adapter.refresh()
    assert torch.equal(net(batch(1)), type(net)()(batch(1)))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_leaf_learns_and_addresses_stay(method, dora):
    net, adapter = adapted(method, dora=dora)
    optimizer = build_optimizer(OPTIMIZER[method], adapter, lr=1e-2)
    before = {key: leaf.detach().clone() for key, leaf in adapter.leaves.items()}
    addresses = [(leaf.data_ptr(), leaf.grad.data_ptr()) for leaf in adapter.parameters()]
    first = train(net, adapter, optimizer, range(1))
    last = train(net, adapter, optimizer, range(1, 30))
    assert last < first
    assert addresses == [(leaf.data_ptr(), leaf.grad.data_ptr()) for leaf in adapter.parameters()]
    for key, leaf in adapter.leaves.items():
        assert (leaf - before[key]).flatten(1).abs().amax(1).min() > 0, key


@pytest.mark.parametrize("method, optimizer", [("stella", "adamw"), ("stella", "sgd"), ("stiefel", "stiefel"),
                                               ("stiefel", "adamw"), ("stiefel", "sgd")])
def test_training_stays_on_the_manifold(method, optimizer):
    net, adapter = adapted(method)
    train(net, adapter, build_optimizer(optimizer, adapter, lr=1e-2, weight_decay=0.1), range(40))
    assert adapter.on_manifold()
    for leaf in adapter.on_manifold().values():
        assert manifold.orthogonality_error(leaf) <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_gradients_accumulate_over_micro_batches(method):
    net, adapter = adapted(method, dtype=torch.float64)
    grads = []
    for parts in ([batch(0), batch(1)], [torch.cat([batch(0), batch(1)])]):
        adapter.zero_grad()
        for part in parts:
            adapter.refresh("raw", torch.float64)
            (net(part.double()).square().sum()).backward()
        grads.append([leaf.grad.clone() for leaf in adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_leaves_are_those_of_plain_autograd(method):
    net, adapter = adapted(method, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for leaf in adapter.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf))
    adapter.refresh("raw", torch.float64)
    net(batch(0).double()).square().mean().backward()
    plain, pair = type(net)(torch.float64), adapter.pair_stacks()
    state = {}
    for number, target in enumerate(adapter.layout.targets):
        delta = adapter.layout.slot(pair, "up", number) @ adapter.layout.slot(pair, "down", number).t()
        name = target.name.removeprefix("net.")
        state[f"{name}.weight"] = dict(plain.named_parameters())[f"{name}.weight"] + delta.view_as(target.module.weight)
    loss = torch.func.functional_call(plain, state, (batch(0).double(),)).square().mean()
    for leaf, expected in zip(adapter.parameters(), torch.autograd.grad(loss, adapter.parameters())):
        assert (leaf.grad - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method, optimizer", [("lora", "adamw"), ("lora", "sgd"), ("lora", "scaled_adamw"),
                                               ("stella", "adamw"), ("stella", "sgd"), ("stiefel", "stiefel"),
                                               ("stiefel", "adamw"), ("stella", "adamw8bit")])
def test_a_non_finite_step_changes_nothing(method, optimizer, bad):
    net, adapter = adapted(method, ema_decay=0.9)
    stepper = build_optimizer(optimizer, adapter, lr=1e-2, weight_decay=0.1)
    for steps in (0, 3):  # as the first step, and later
        train(net, adapter, stepper, range(steps))
        before = [{k: t.clone() for k, t in part.state_dict().items()} for part in (adapter, stepper)]
        for leaf in adapter.parameters():
            leaf.grad.fill_(bad)
        take_step(adapter, stepper, torch.tensor(1.0))
        assert adapter.skip
        before[0]["steps"] += 1
        for part, then in zip((adapter, stepper), before):
            assert {k: t for k, t in part.state_dict().items() if not torch.equal(t, then[k])} == {}
    take_step(adapter, stepper, torch.tensor(torch.nan))
    assert adapter.skip
    train(net, adapter, stepper, range(1))
    assert not adapter.skip


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_average_is_of_the_exported_pair(method, dora):
    net, adapter = adapted(method, ema_decay=0.5, dora=dora)
    optimizer = build_optimizer(OPTIMIZER[method], adapter, lr=1e-2)
    expected = {name: (up, down) for name, up, down, _ in adapter.pairs()}
    for step in range(4):
        train(net, adapter, optimizer, range(step, step + 1))
        decay = min(0.5, (2 + step) / (11 + step))
        for name, up, down, _ in adapter.pairs():
            expected[name] = tuple(decay * old + (1 - decay) * new for old, new in zip(expected[name], (up, down)))
    for name, up, down, _ in adapter.pairs("ema"):
        assert torch.allclose(up, expected[name][0], atol=1e-6)
        assert torch.allclose(down, expected[name][1], atol=1e-6)
    adapter.refresh("ema")
    averaged = net(batch(1))
    adapter.refresh("raw")
    assert not torch.equal(averaged, net(batch(1)))


@pytest.mark.parametrize("rank, at_most", [(10, 9), (72, 9), (8, 7)])
def test_a_rank_that_does_not_fit_names_the_layer_and_the_highest_that_does(rank, at_most):
    with pytest.raises(UserError, match=rf"adapter.rank = {rank} .*net\.\w+, .*at most {at_most if rank > 8 else 7}"):
        targets = targets_of(adapted("lora")[0])
        build(targets if rank == 8 else targets[1:], method="lora", rank=rank)


@pytest.mark.parametrize("method", METHODS)
def test_rank_one_trains(method):
    net, adapter = trained(method, 10, rank=1)
    assert all(leaf.isfinite().all() for leaf in adapter.parameters())
    for leaf in adapter.on_manifold().values():
        assert manifold.orthogonality_error(leaf) <= 1e-6


def test_no_targets_and_grouped_convolutions_are_plain_errors():
    with pytest.raises(UserError, match="adapter.target_pattern match nothing"):
        build([], method="lora", rank=2)
    grouped = Target("net.depthwise", nn.Conv2d(8, 8, 3, groups=8), "conv")
    with pytest.raises(UserError, match="net.depthwise is a convolution with groups"):
        build([grouped], method="lora", rank=2)


def test_an_init_of_another_method_is_a_plain_error():
    with pytest.raises(UserError, match="adapter.init = 'pissa' does not go with adapter.method = 'stella'"):
        adapted("stella", init="pissa")


def test_a_forward_patched_on_the_instance_is_refused():
    net = adapted("lora")[0]
    fresh = type(net)()
    fresh.first.forward = lambda x: x
    with pytest.raises(RuntimeError, match="net.first"):
        build(targets_of(fresh), method="lora", rank=2).install()


def test_stacks_are_few():
    parameters = 3 * (54 + 72 + 8 + 5 * 10) + 4 * 9
    assert adapted("stella")[1].describe() == {"layers": 4, "stacks": 5, "parameters": parameters, "scale_dim": 10}
