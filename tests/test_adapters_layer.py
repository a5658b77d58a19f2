"""Layers whose weight is not an ordinary fp32 matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.adapters import Target, build
from trainer.adapters.layer import base_matrix, transposed_product
from trainer.optim import build_optimizer, clip_grad_norm


class EightBitLinear(nn.Module):
    """Stands for any quantised layer: integers and a scale, no floating weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).t()


def test_a_quantised_layer_is_read_through_its_own_gradient():
    linear = nn.Linear(12, 9, bias=False)
    quantised = EightBitLinear(linear)
    target, up = Target("q", quantised, "g"), torch.randn(9, 3)
    weight = quantised.weight * quantised.scale
    assert torch.allclose(base_matrix(target), weight, atol=1e-6)
    assert torch.allclose(transposed_product(target, up), weight.t() @ up, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method, init", [("lora", "pissa"), ("stiefel", "default"), ("stella", "svd-major")])
def test_an_adapter_over_a_quantised_layer_learns_what_it_would_over_its_matrix(method, init, dora):
    quantised, losses = EightBitLinear(nn.Linear(12, 9)), []
    plain = nn.Linear(12, 9, bias=False)
    plain.weight.data = quantised.weight * quantised.scale
    for module in (quantised, plain):
        adapter = build([Target("q", module, "g")], method=method, init=init, rank=2, dora=dora)
        adapter.install()
        optimizer = build_optimizer("adamw" if method != "stiefel" else "stiefel", adapter, lr=1e-2)
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
        for _ in range(5):
            adapter.refresh()
            loss = (module(x) - 1).square().mean()
            loss.backward()
            adapter.guard(loss, clip_grad_norm(adapter.parameters(), 1.0))
            adapter.before_step()
            optimizer.step()
            adapter.after_step()
            adapter.zero_grad()
        losses.append(torch.cat([loss.detach()[None], x.grad.flatten()]))
    assert torch.allclose(*losses, atol=1e-4)


def test_bf16_layers_compute_in_bf16_and_keep_fp32_masters():
    module = nn.Linear(12, 9, dtype=torch.bfloat16)
    adapter = build([Target("q", module, "g")], method="stella", rank=2, init="random")
    adapter.install()
    adapter.refresh("raw", torch.bfloat16)
    module(torch.randn(3, 12, dtype=torch.bfloat16)).square().sum().backward()
    assert {leaf.dtype for leaf in adapter.parameters()} == {leaf.grad.dtype for leaf in adapter.parameters()}
    assert {leaf.dtype for leaf in adapter.parameters()} == {torch.float32}
    assert all(leaf.grad.abs().max() > 0 for leaf in adapter.parameters())
