"""Quantised frozen linears: what is stored, what is multiplied, and that no gradient needs more than that."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from tests.tiny import batch, take_step
from trainer.adapters import Target, build
from trainer.optim import build_optimizer
from trainer.quantize.linear import QuantizedLinear, stored_gradient, stored_product
from trainer.quantize.model import MODES, quantised_linear

ERROR = {"int8": 0.01, "fp8": 0.04, "nf4": 0.12}  # of the weight, relative: normal numbers, rows of one size


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=dtype)


def layer_of(mode: str, rows: int = 24, columns: int = 40, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    bias = torch.arange(rows, dtype=dtype)
    return quantised_linear(weight_of(rows, columns, dtype), None, bias, mode, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_forward_and_input_gradient_are_those_of_the_dequantised_weight(mode, dtype):
    layer = layer_of(mode, dtype=dtype)
    x = torch.randn(3, 5, 40).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    y.backward(grad := torch.randn(3, 5, 24).to(dtype))
    assert layer.weight.dtype == y.dtype == dtype and layer.weight.shape == (24, 40)
    assert not any(tensor.numel() for tensor in saved)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias)) and torch.equal(y, layer(x.detach()))
    assert torch.equal(x.grad, grad @ layer.weight)


@pytest.mark.parametrize("shape", [(24, 40), (64, 128), (7, 5), (13, 11), (3, 1), (1, 257), (300, 65)])
@pytest.mark.parametrize("mode", MODES)
def test_weights_of_any_size_stay_close_and_come_out_the_same_each_time(mode, shape):
    weight = weight_of(*shape)
    first, second = (quantised_linear(weight, None, None, mode, torch.float32) for _ in range(2))
    assert (first.weight - weight).norm() <= ERROR[mode] * weight.norm()
    assert (first.in_features, first.out_features) == (shape[1], shape[0]) and first.bias is None
    for (name, a), (_, b) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert torch.equal(a.float(), b.float()), name


@pytest.mark.parametrize("mode", MODES)
def test_empty_rows_and_zero_weights_are_zero(mode):
    weight = weight_of(6, 100) * (torch.arange(6) > 2)[:, None]
    assert torch.equal(quantised_linear(weight, None, None, mode, torch.float32).weight[:3], torch.zeros(3, 100))


def test_nf4_is_bitsandbytes_own():
    weight = weight_of(96, 128).bfloat16()
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(quantised_linear(weight, None, None, "nf4", torch.bfloat16).weight, expected)


def test_int8_has_the_rows_of_bitsandbytes_linear_and_its_product_up_to_its_rounded_inputs():
    weight = weight_of(32, 64).half().float()
    theirs = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=0.0)
    theirs.load_state_dict({"weight": weight})
    theirs.to("cpu")
    x = torch.randn(8, 64)
    expected = theirs(x)
    layer = quantised_linear(weight, None, None, "int8", torch.float32)
    assert torch.equal(layer.codes, theirs.weight.CB if theirs.state.CB is None else theirs.state.CB)
    assert (layer(x) - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("scale", [None, torch.tensor(0.02), torch.tensor([0.02]), torch.rand(24) + 0.1])
def test_fp8_codes_of_a_file_are_held_as_they_are(scale):
    codes = weight_of(24, 40).to(torch.float8_e4m3fn)
    layer = quantised_linear(codes, scale, None, "fp8", torch.bfloat16)
    exact = codes.float() * (1.0 if scale is None else scale.reshape(-1, 1))
    assert torch.equal(layer.codes.float(), codes.float())
    assert torch.equal(layer.weight, exact.bfloat16())
    for mode in ("int8", "nf4"):
        again = quantised_linear(codes, scale, None, mode, torch.float32).weight
        assert (again - exact).norm() <= ERROR[mode] * exact.norm()


# Under adapters


class Net(nn.Module):
    """x [b, 40] -> [b, 24], through two layers that share their input (stacked rows) and one of an odd size."""

    def __init__(self, mode: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = (layer_of(mode, rows, 40, dtype) for rows in (24, 24))
        self.last = layer_of(mode, 24, 24, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) - self.second(x) / 2) + x[:, :24])


def adapted(mode: str, method: str, dtype: torch.dtype = torch.float64, **options: object):
    net = Net(mode, dtype)
    targets = [Target("net.both", net.first, "x", (net.first, net.second)), Target("net.last", net.last, "x")]
    adapter = build(targets, method=method, rank=3, dtype=dtype, **options)
    adapter.install()
    adapter.refresh("raw", dtype)
    return net, adapter


def plainly(net: Net, x: Tensor) -> Tensor:
    """The same network from autograd's own operations on the dequantised weights."""

    def layer(module: QuantizedLinear, x: Tensor) -> Tensor:
        x = x if module.adapter_gain is None else x * module.adapter_gain
        return F.linear(x, module.weight + module.adapter_up @ module.adapter_down.t(), module.bias)

    return layer(net.last, torch.tanh(layer(net.first, x) - layer(net.second, x) / 2) + x[:, :24])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", ["lora", "stiefel", "stella"])
@pytest.mark.parametrize("mode", MODES)
def test_the_fused_layers_gradients_are_autograds_on_the_dequantised_weight(mode, method, dora):
    net, adapter = adapted(mode, method, dora=dora)
    with torch.no_grad():
        for key, leaf in adapter.leaves.items():
            if key.split(".")[0] in ("up", "core"):
                leaf.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(5), dtype=leaf.dtype))
    adapter.refresh("raw", torch.float64)
    x, seed = torch.randn(5, 40, dtype=torch.float64, requires_grad=True), torch.randn(5, 24, dtype=torch.float64)
    wanted = [x, *adapter.parameters()]
    ours = torch.autograd.grad((net(x) * seed).sum(), wanted)
    adapter.refresh("raw", torch.float64)
    reference = plainly(net, x)
    assert (net(x) - reference).abs().max() <= 1e-12 * reference.abs().max()
    for found, expected in zip(ours, torch.autograd.grad((reference * seed).sum(), wanted)):
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("method", "init", "dora"), [
    ("lora", "pissa", False), ("lora", "olora", False), ("lora", "default", True), ("stella", "pseudo-zero", False)])
def test_starts_leave_the_quantised_model_as_it_is(mode, method, init, dora):
    net, _ = adapted(mode, method, init=init, dora=dora)
    x = torch.randn(5, 40, dtype=torch.float64)
    expected = Net(mode, torch.float64)(x)
    assert (net(x) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize(("method", "init"), [("lora", "pissa"), ("stella", "svd-major")])
def test_starts_from_the_weight_take_the_dequantised_one(method, init):
    net, adapter = adapted("nf4", method, init=init)
    stacked = torch.cat([net.first.weight, net.second.weight])
    left = torch.linalg.svd(stacked).U[:, :3]
    (_, up, _, _), _ = adapter.pairs()
    assert torch.linalg.matrix_rank(torch.cat([left, up[:, :3].double()], 1), rtol=1e-9) == 3


@pytest.mark.parametrize("mode", MODES)
def test_training_over_it_lowers_the_loss_and_leaves_the_codes_alone(mode):
    net, adapter = adapted(mode, "stella", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in net.named_buffers()}
    optimizer, losses = build_optimizer("adamw", adapter, lr=5e-2), []
    x = batch(0).flatten(1)[:, :40]
    for _ in range(20):
        adapter.refresh("raw", torch.float32)
        loss = net(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        take_step(adapter, optimizer, loss)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[name].float(), tensor.float()) for name, tensor in net.named_buffers())


# Compiled


@pytest.mark.parametrize("mode", MODES)
def test_operators_are_what_the_compiler_is_told_of_them(mode):
    layer = layer_of(mode, dtype=torch.bfloat16)
    for x in (torch.randn(40), torch.randn(5, 40), torch.randn(40, 3, 2).movedim(0, -1), torch.ones(3, 1, 1)):
        x, stored = x.bfloat16().expand(*x.shape[:-1], 40), (layer.stored, layer.shape, torch.bfloat16)
        torch.library.opcheck(stored_product, (x, *stored, layer.bias), test_utils="test_faketensor")
        torch.library.opcheck(stored_gradient, (x[..., :24], *stored), test_utils="test_faketensor")


def graphs_of(function: Callable) -> tuple[Callable, list[list[Tensor]]]:
    """The function compiled with everything but the generation of code; and of each forward graph what it makes, be it
    returned or kept for the backward pass (inputs may be kept as well, and take no more)."""
    made = []

    def look(graph: fx.GraphModule, _: list[Tensor]) -> Callable:
        [output] = graph.graph.find_nodes(op="output")
        made.append([node.meta["val"] for node in output.args[0] if node is not None and node.op != "placeholder"])
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=look, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
                            partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    return torch.compile(function, backend=compiler, fullgraph=True, dynamic=False), made


@pytest.mark.parametrize(("mode", "method", "dora"), [
    ("int8", "lora", True), ("fp8", "stella", False), ("nf4", "stiefel", False)])
def test_compiled_layers_share_one_function_and_keep_no_dequantised_weight(mode, method, dora):
    compiled, made = graphs_of(Net.forward)
    for seed in range(2):
        torch.manual_seed(seed)
        net, adapter = adapted(mode, method, dora=dora)
        with torch.no_grad():
            for leaf in adapter.parameters():
                leaf.add_(torch.randn_like(leaf) / 10)
        x, found = torch.randn(5, 40, dtype=torch.float64, requires_grad=True), []
        for forward in (Net.forward, compiled):
            adapter.refresh("raw", torch.float64)
            y = forward(net, x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])])
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    [kept] = made
    assert max(tensor.numel() for tensor in kept) < 24 * 24
