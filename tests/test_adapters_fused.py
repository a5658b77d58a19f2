"""The fused layer: gradients, memory, autocast, checkpointing and compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.tiny import METHODS, adapted, batch
from trainer.adapters.fused import FusedLayer, composed
from trainer.adapters.layer import adapted_class


class ScaledLinear(nn.Linear):
    """A layer whose weight is not what multiplies, as a quantised one's is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2) / 3


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = {"linear": lambda: nn.Linear(7, 5), "no bias": lambda: nn.Linear(7, 5, bias=False),
             "other": lambda: ScaledLinear(7, 5), "conv": lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1, dilation=2),
             "pointwise": lambda: nn.Conv2d(4, 5, 1)}[kind]().double().requires_grad_(False)
    layer.__class__ = adapted_class(type(layer))
    layer.adapter_convolution = isinstance(layer, nn.Conv2d)
    return layer


def inputs_of(layer: nn.Module, gain: bool, dropout: bool) -> list[Tensor | None]:
    torch.manual_seed(1)
    conv = hasattr(layer, "kernel_size")
    shape, columns = ((2, 4, 7, 6), 4 * layer.kernel_size[0] ** 2) if conv else ((2, 3, 7), 7)
    x = torch.randn(shape, dtype=torch.float64)
    dropped = x * (torch.rand(shape) > 0.3) / 0.7 if dropout else None
    scale = torch.rand(4 if conv else 7, dtype=torch.float64) + 0.5 if gain else None
    pair = torch.randn(columns, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    return [None if t is None else t.requires_grad_() for t in (x, dropped, scale, *pair)]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("kind", ["linear", "no bias", "other", "conv", "pointwise"])
def test_gradients_are_those_of_autograd(kind, gain, dropout):
    layer = layer_of(kind)
    inputs = inputs_of(layer, gain, dropout)
    wanted = [t for t in inputs if t is not None]
    torch.manual_seed(2)
    ours, theirs = FusedLayer.apply(*inputs, layer), composed(*inputs, layer)
    assert (ours - theirs).abs().max() <= 1e-13
    weight = torch.randn_like(ours)
    expected = torch.autograd.grad((theirs * weight).sum(), wanted)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), wanted), expected):
        assert (a - b).abs().max() <= 1e-12
    assert torch.autograd.gradcheck(lambda *t: FusedLayer.apply(*_placed(inputs, t), layer), wanted)


def _placed(inputs: list[Tensor | None], given: tuple[Tensor, ...]) -> list[Tensor | None]:
    rest = iter(given)
    return [None if t is None else next(rest) for t in inputs]


def test_it_saves_the_input_once_and_nothing_of_the_weight():
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer.__class__ = adapted_class(nn.Linear)
    x, down, up = torch.randn(32, 64, requires_grad=True), torch.randn(64, 4), torch.randn(64, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        FusedLayer.apply(x, None, None, down.requires_grad_(), up.requires_grad_(), layer)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_under_autocast_it_saves_and_multiplies_in_the_compute_dtype():
    layer = nn.Linear(8, 6).requires_grad_(False)
    layer.__class__ = adapted_class(nn.Linear)
    x = torch.randn(5, 8, requires_grad=True)
    down, up = (torch.randn(n, 2).bfloat16().requires_grad_() for n in (8, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = FusedLayer.apply(x, None, None, down, up, layer)
    y.square().sum().backward()
    assert (y.dtype, x.grad.dtype, down.grad.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    exact = nn.functional.linear(x, layer.weight + up.float() @ down.float().t(), layer.bias)
    assert (y - exact).abs().max() <= 0.05 * exact.abs().max()


def test_an_fp32_pair_under_autocast_keeps_its_own_precision():
    layer = nn.Linear(8, 6).requires_grad_(False)
    layer.__class__ = adapted_class(nn.Linear)
    x, down, up = torch.randn(5, 8), torch.randn(8, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        FusedLayer.apply(x, None, None, down, up, layer).float().sum().backward()
    assert torch.allclose(up.grad, (x @ down).sum(0).expand(6, 2), atol=1e-4)


@pytest.mark.parametrize("reentrant", [False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputing_under_checkpointing_gives_the_same_gradients(dropout, reentrant):
    grads = []
    for run in (lambda net, x: net(x), lambda net, x: checkpoint(net, x, use_reentrant=reentrant)):
        net, adapter = adapted("stella", dropout=dropout)
        adapter.refresh()
        torch.manual_seed(3)
        run(net, batch(0).requires_grad_()).square().mean().backward()
        grads.append([leaf.grad.clone() for leaf in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert any(grad.abs().max() > 0 for grad in grads[0])


def test_dropout_acts_on_the_adapter_alone_and_only_where_gradients_are_recorded():
    net, adapter = adapted("stella", dropout=0.5)
    adapter.refresh()
    with torch.no_grad():
        assert torch.equal(net(batch(0)), net(batch(0)))
    assert not torch.equal(net(batch(0)), net(batch(0)))
    adapter.refresh("off")
    assert torch.equal(net(batch(0)), net(batch(0)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("method", METHODS)
def test_regional_compilation_gives_the_same_gradients_with_one_graph_for_all_blocks(method):
    from tests.tiny import targets_of
    from trainer.adapters import build

    torch._dynamo.reset()
    net, counter = Blocks(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    adapter = build(targets_of(net), method=method, rank=2)
    adapter.install()
    x, grads = torch.randn(3, 12), []
    for compiled in (False, True):
        if compiled:
            for block in net.blocks:
                block.compile(backend=counter)
        for _ in range(2):
            adapter.zero_grad()
            adapter.refresh()
            net(x).square().mean().backward()
        grads.append([leaf.grad.clone() for leaf in adapter.parameters()])
    assert counter.frame_count <= 2  # the first block's input needs no gradient, the others' do
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-6)
