"""The whole optimizer step in one call, eager and captured."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import OPTIMIZER, adapted, batch, train
from trainer.adapters.bank import MEASURE_EVERY
from trainer.optim import build_optimizer, set_lr
from trainer.update import Update

WAYS = [("lora", "adamw"), ("lora", "sgd"), ("lora", "scaled_adamw"), ("stiefel", "stiefel"), ("stiefel", "adamw"),
        ("stella", "adamw"), ("stella", "sgd")]


def run(device: str, method: str, optimizer: str, captured: bool, bad_step: int = -1) -> dict[str, torch.Tensor]:
    net, adapter = adapted(method, dora=True, ema_decay=0.9, device=device)
    adapter.steps.fill_(MEASURE_EVERY - 5)  # the sixth of eight steps measures
    stepper = build_optimizer(optimizer, adapter, lr=1e-2, weight_decay=0.1)
    update = Update(adapter, stepper, 1.0)
    update.capturable &= captured
    for step in range(8):
        set_lr(stepper, 1e-2 / (1 + step))
        adapter.refresh()
        loss = net(batch(step).to(device)).square().mean()
        loss.backward()
        assert update(loss * (torch.nan if step == bad_step else 1.0)).isfinite()
    assert set(update.graphs) == ({False, True} if captured and device == "cuda" else set())
    return {key: tensor.detach().cpu() for key, tensor in (adapter.state_dict() | stepper.state_dict()).items()}


@pytest.mark.parametrize("method", list(OPTIMIZER))
def test_one_call_is_the_whole_step(method):
    net, adapter = adapted(method, ema_decay=0.9)
    train(net, adapter, build_optimizer(OPTIMIZER[method], adapter, lr=1e-2), range(3))
    expected = adapter.state_dict()
    net, adapter = adapted(method, ema_decay=0.9)
    update = Update(adapter, build_optimizer(OPTIMIZER[method], adapter, lr=1e-2), 1.0)
    for step in range(3):
        torch.manual_seed(step)
        adapter.refresh()
        loss = net(batch(step)).square().mean()
        loss.backward()
        update(loss)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter.state_dict().items())


def test_a_bad_loss_is_skipped():
    states = run("cpu", "stella", "adamw", False, bad_step=5)
    assert states["updates"] == 7 and all(t.float().isfinite().all() for t in states.values())


@pytest.mark.gpu
@pytest.mark.parametrize("method, optimizer", WAYS)
def test_a_captured_step_equals_an_eager_one(method, optimizer):
    eager, captured = (run("cuda", method, optimizer, captured, bad_step=6) for captured in (False, True))
    for key, tensor in eager.items():
        assert torch.allclose(tensor.float(), captured[key].float(), atol=1e-5), key
