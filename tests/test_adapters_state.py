"""Saving and restoring an adapter with its optimizer, to the bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from tests.tiny import OPTIMIZER, adapted, batch, train
from trainer.adapters.effective_rank import measure
from trainer.errors import UserError
from trainer.optim import build_optimizer, set_lr

WAYS = [("lora", "adamw", {}), ("lora", "sgd", {}), ("lora", "scaled_adamw", {}), ("lora", "adamw", {"init": "pissa"}),
        ("lora", "adamw8bit", {}), ("stiefel", "stiefel", {}), ("stiefel", "adamw", {}), ("stella", "adamw", {}),
        ("stella", "adamw", {"init": "pseudo-zero"}), ("stella", "sgd", {"retraction": "exponential"}),
        ("stella", "adamw8bit", {}), ("stella", "adamw", {"diagonal_s": True}), ("trilora", "adamw", {})]


def run(method: str, optimizer: str, options: dict, parts: list[range], dora: bool) -> tuple:
    """Train in parts, each in a fresh process's place: built anew and restored from bytes."""
    saved = None
    for part in parts:
        net, adapter = adapted(method, dora=dora, ema_decay=0.9, dropout=0.2, **options)
        stepper = build_optimizer(optimizer, adapter, lr=1e-2, weight_decay=0.01)
        if saved:
            adapter.load_state_dict(load(saved[0]))
            stepper.load_state_dict(load(saved[1]))
        for step in part:
            set_lr(stepper, 1e-2 / (1 + step))
            train(net, adapter, stepper, range(step, step + 1))
            if options.get("diagonal_s") and step == 3:
                adapter.prune(2)
        saved = save(adapter.state_dict()), save(stepper.state_dict())
    adapter.refresh("ema")
    return adapter.state_dict(), stepper.state_dict(), {"out": net(batch(99))}, measure(adapter)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method, optimizer, options", WAYS)
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(method, optimizer, options, dora):
    whole = run(method, optimizer, options, [range(8)], dora)
    parts = run(method, optimizer, options, [range(3), range(3, 5), range(5, 8)], dora)
    for a, b in zip(whole[:3], parts[:3]):
        assert set(a) == set(b)
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert whole[3] == parts[3]


def test_restoring_changes_no_address():
    net, adapter = adapted("stella", ema_decay=0.9)
    optimizer = build_optimizer("adamw", adapter, lr=1e-2)

    def addresses() -> list[int]:
        tensors = [*adapter.state_dict().items(), *optimizer.state_dict().items()]
        grads = [leaf.grad.data_ptr() for leaf in adapter.parameters()]
        rates = [group["lr"].data_ptr() for group in optimizer.param_groups]
        return grads + rates + [tensor.data_ptr() for key, tensor in tensors if key != "layers"]

    before = addresses()
    train(net, adapter, optimizer, range(2))
    adapter.load_state_dict(load(save(adapter.state_dict())))
    optimizer.load_state_dict(load(save(optimizer.state_dict())))
    assert before == addresses()


def test_a_state_with_what_earlier_programs_counted_is_taken():
    net, adapter = adapted("stella")
    train(net, adapter, build_optimizer("adamw", adapter, lr=1e-2), range(2))
    saved, fresh = adapter.state_dict(), adapted("stella")[1]
    assert "skipped_in_a_row" not in saved
    fresh.load_state_dict(saved | {"skipped_in_a_row": torch.zeros((), dtype=torch.int64)})
    assert all(torch.equal(tensor, saved[key]) for key, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("other, message", [
    (lambda: adapted("stella"), "made with other settings"),
    (lambda: adapted("lora", ema_decay=0.9), "made with other settings"),
    (lambda: adapted("lora", rank=2), "adapter.rank may differ"),
    (lambda: adapted("lora", dtype=torch.float64), "float64"),
])
def test_a_state_that_does_not_fit_is_a_plain_error(other, message):
    with pytest.raises(UserError, match=message):
        adapted("lora")[1].load_state_dict(other()[1].state_dict())


def test_a_state_of_other_layers_of_equal_sizes_is_refused():
    from dataclasses import replace

    from tests.tiny import TinyNet, targets_of
    from trainer.adapters import build

    targets = targets_of(TinyNet())
    swapped = [replace(target, name=target.name + "x") for target in targets]
    state = build(swapped, method="lora", rank=2).state_dict()
    with pytest.raises(UserError, match="belongs to other layers"):
        build(targets, method="lora", rank=2).load_state_dict(state)


def test_an_optimizer_state_of_another_optimizer_is_refused():
    states = {name: build_optimizer(name, adapted("lora")[1], lr=1.0).state_dict() for name in ("adamw", "sgd")}
    with pytest.raises(UserError, match="another optimizer"):
        build_optimizer("sgd", adapted("lora")[1], lr=1.0).load_state_dict(states["adamw"])


@pytest.mark.parametrize("method", list(OPTIMIZER))
def test_the_seed_decides_the_start(method):
    starts = [adapted(method, seed=seed)[1].state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert not all(torch.equal(starts[0][key], starts[2][key]) for key in starts[0])
