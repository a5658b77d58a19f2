"""An adapter over the stacked rows of several linears is the adapter of one linear with all the rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import OPTIMIZER, take_step
from trainer.adapters import Target, build
from trainer.adapters.target import matching
from trainer.optim import build_optimizer

ROWS = (8, 8, 8, 20)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("method", "init"), [("lora", "pissa"), ("stiefel", "default"), ("stella", "svd-major"),
                                              ("stella", "pseudo-zero")])
def test_stacked_rows_learn_as_one_linear(method, init, dora):
    torch.manual_seed(0)
    whole = nn.Linear(8, sum(ROWS))
    parts = [nn.Linear(8, rows) for rows in ROWS]
    for part, weight, bias in zip(parts, whole.weight.split(ROWS), whole.bias.split(ROWS)):
        part.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    results = []
    for target, forward in ((Target("q", whole, "g"), whole),
                            (Target("q", parts[0], "g", tuple(parts)), lambda x: torch.cat([p(x) for p in parts], -1))):
        assert (target.rows, target.columns, len(target.modules)) == (sum(ROWS), 8, 4 if target.parts else 1)
        adapter = build([target], method=method, init=init, rank=3, dora=dora)
        adapter.install()
        optimizer = build_optimizer(OPTIMIZER[method], adapter, lr=1e-2)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        for _ in range(4):
            adapter.refresh()
            loss = (forward(x) - 1).square().mean()
            loss.backward()
            take_step(adapter, optimizer, loss)
        results.append(torch.cat([loss.detach()[None], x.grad.flatten(), adapter.delta("q").flatten().float()]))
        adapter.refresh("off")
        torch.testing.assert_close(forward(x), nn.functional.linear(x, whole.weight, whole.bias))
        adapter.remove()
        assert all(type(module) is nn.Linear for module in target.modules)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_a_pattern_narrows_the_targets():
    targets = [Target(name, nn.Linear(2, 2), "g") for name in ("a.0.to_q", "a.1.to_q", "a.1.ff")]
    assert [target.name for target in matching(targets, r"\.1\.to_")] == ["a.1.to_q"]
    assert matching(targets, "") == targets
