"""DoRA's magnitudes against the definition with whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny import TinyNet, adapted, batch, trained
from trainer.adapters import Adapter

METHODS = ["lora", "stiefel", "stella"]
STARTS = [("lora", "default"), ("lora", "pissa"), ("stiefel", "default"), ("stella", "random"), ("stella", "zero"),
          ("stella", "pseudo-zero"), ("stella", "svd-major")]


def weights_by_definition(adapter: Adapter) -> dict[str, Tensor]:
    """magnitude * (W + delta) / |W + delta| with m x n matrices, by layer; differentiable but for the norm."""
    pair, weights = adapter.pair_stacks(), {}
    for number, target in enumerate(adapter.layout.targets):
        delta = adapter.layout.slot(pair, "up", number) @ adapter.layout.slot(pair, "down", number).t()
        whole = target.module.weight.double() + delta.view_as(target.module.weight).double()
        other = (0, 2, 3) if target.convolution else (0,)
        norm = whole.square().sum(other, keepdim=True).sqrt().detach()
        members = adapter.layout.members(f"magnitude.{target.inputs}")
        magnitude = adapter.leaves[f"magnitude.{target.inputs}"][members.index(number)].double()
        weights[target.name] = magnitude.view(norm.shape) / norm * whole
    return weights


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_the_definition(method):
    net, adapter = adapted(method, dtype=torch.float64, dora=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for leaf in adapter.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf))
    adapter.refresh("raw", torch.float64)
    loss = net(batch(0).double()).square().mean()
    loss.backward()
    state = {name.removeprefix("net.") + ".weight": weight for name, weight in weights_by_definition(adapter).items()}
    plain = torch.func.functional_call(TinyNet(torch.float64), state, (batch(0).double(),)).square().mean()
    assert abs((loss - plain).item()) <= 1e-12
    for leaf, expected in zip(adapter.parameters(), torch.autograd.grad(plain, adapter.parameters())):
        assert (leaf.grad - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("method, init", STARTS)
def test_the_start_is_that_of_the_method_without_magnitudes(method, init):
    outputs = []
    for dora in (False, True):
        net, adapter = adapted(method, init=init, dora=dora)
        adapter.refresh()
        outputs.append(net(batch(0)))
    assert torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_magnitudes_do_not_decay_and_the_file_reproduces_the_layer(method):
    net, adapter = trained(method, 10, dora=True)
    adapter.refresh()
    files = {name: (up, down, magnitude) for name, up, down, magnitude in adapter.pairs()}
    up, down, magnitude = files["net.first"]
    whole = net.first.weight + up @ down
    weight = magnitude * whole / whole.norm(dim=0, keepdim=True)  # as ComfyUI, Forge and A1111 apply it
    x = torch.randn(3, 72)
    assert torch.allclose(net.first(x), torch.nn.functional.linear(x, weight, net.first.bias), atol=1e-5)


def test_small_magnitude_changes_survive_a_16_bit_compute_dtype():
    net, adapter = adapted("lora", dora=True)
    net.first.weight.data = net.first.weight.data.bfloat16().float()
    with torch.no_grad():
        adapter.leaves["magnitude.72"].mul_(1 + 2**-10)  # below the resolution of bf16 at 1
    x, outputs = torch.randn(4096, 72), []
    for dtype in (torch.float32, torch.bfloat16):
        adapter.refresh("raw", dtype)
        outputs.append((net.first(x.to(torch.float32)) - net.first.base_forward(x)).norm())
    assert outputs[1] > 0.9 * outputs[0] > 0
