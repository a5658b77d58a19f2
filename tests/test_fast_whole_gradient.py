"""Gradients that come to attention are whole in every kind of block, as cuDNN's kept plans need it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench import step_time, true_size
from trainer.fast import whole_gradient

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", ["flux1-dev:1", "flux1-dev:1:full", "flux1-dev:1:selective", "klein-4b:1",
                                  "klein-4b:1:selective", "sd15:1"])
def test_attentions_gradients_lie_alike_and_the_numbers_are_the_same(case: str, monkeypatch) -> None:
    expected, plain, calls, whole = gradients(case), whole_gradient._plain, [], []

    def watching(*given: Tensor, **named: object) -> Tensor:
        found = plain(*given, **named)  # b h n d
        if found.requires_grad:
            calls.append(found.shape)
            found.register_hook(lambda grad: whole.append(grad.transpose(1, 2).is_contiguous()))
        return found

    monkeypatch.setattr(whole_gradient, "_plain", watching)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)  # is put back afterwards
    whole_gradient.install()
    found = gradients(case)
    assert all(whole) and 5 <= len(whole) <= len(calls)  # checkpointed blocks call twice
    assert all(map(torch.equal, found, expected)) and any(grad.any() for grad in found)


def test_the_compiler_sees_through_it(monkeypatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    whole_gradient.install()

    def part(x: Tensor) -> Tensor:  # b n d
        found = F.scaled_dot_product_attention(*[x.unflatten(-1, (2, -1)).transpose(1, 2)] * 3)
        return torch.cat([found.transpose(1, 2).flatten(2), x], dim=2)

    x = torch.randn(1, 6, 8, requires_grad=True)
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    [found], [expected] = (torch.autograd.grad(way(x).square().sum(), x) for way in (compiled, part))
    assert torch.equal(found, expected)


def gradients(case: str) -> list[Tensor]:
    [row] = step_time.rows_of(case, ["stella"])
    size = true_size.shrunk(true_size.SIZES[row.size])
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, "none", CPU, torch.float32)
    session = step_time.session_of(size, "stella", ["adapter.init=random"], denoiser, CPU, torch.float32, row)
    session.gradients(true_size.draws(size, 0))
    return [leaf.grad for leaf in session.adapter.parameters()]
