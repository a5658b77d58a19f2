"""Products in 8 bits: the arithmetic they should have, near the whole product, over every storage, and the way back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench import step_time, true_size
from trainer.adapters import Target, build
from trainer.fast import low_bits, matmul, passes
from trainer.fast.matmul import CODES, LowBits
from trainer.fast.product import codes_of_rows
from trainer.quantize.linear import rows_to_codes
from trainer.quantize.model import quantised_linear

ERROR = {"fp8": 0.045, "int8": 0.012}  # of a product with normal numbers, relative


class Net(nn.Module):
    """x [..., 64] -> [..., 96] through the linears of a block."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, store: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [self._layer(store, dtype, n, 96) for n in (64, 96)]
        self.block = nn.ModuleList([nn.Sequential(*layers)])

    def _layer(self, store: str, dtype: torch.dtype, n: int, m: int) -> nn.Module:
        layer = nn.Linear(n, m, dtype=dtype).requires_grad_(False)
        return layer if store == "none" else quantised_linear(layer.weight, None, layer.bias, store, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.block[0](x)


def low_of(net: nn.Module, kind: str) -> LowBits:
    return LowBits(kind, frozenset(matmul.able_linears(net, kind)))


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def through(net: nn.Module, rows: int = 50) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input."""
    torch.manual_seed(1)
    x = (torch.randn(3, rows, 64) * torch.rand(3, rows, 1)).to(torch.bfloat16).requires_grad_()
    y = net(x)
    return y.detach(), torch.autograd.grad(y, x, torch.randn_like(y))[0]


@pytest.mark.parametrize("kind", CODES)
def test_a_product_is_that_of_the_codes_and_near_the_whole_one(kind: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(50, 64) * torch.rand(50, 1), torch.randn(96, 64) * torch.rand(96, 1), torch.randn(96)
    grad, hidden, up, down = torch.randn(50, 96), torch.randn(50, 4), torch.randn(96, 4), torch.randn(64, 4)
    codes, scale = rows_to_codes(weight, CODES[kind])
    own, own_scale = rows_to_codes(x, CODES[kind])
    exact = (own.double() * own_scale) @ (codes.double() * scale).t() + bias + hidden.double() @ up.double().t()
    y = matmul.multiplied(x, codes, scale=scale, bias=bias, hidden=hidden, factor=up)
    assert distance(y, exact) < 1e-6
    assert distance(y - bias - hidden @ up.t(), x @ weight.t()) < ERROR[kind]
    back = matmul.multiplied(grad, codes.t().contiguous(), gain=scale, hidden=hidden, factor=down)
    assert distance(back - hidden @ down.t(), grad @ weight) < ERROR[kind]


@pytest.mark.parametrize("kind", CODES)
def test_the_compiler_is_told_the_order_of_codes_whatever_that_of_inputs(kind: str) -> None:
    x, gain = torch.randn(64, 50).t(), torch.rand(64, 1)
    for given in (None, gain, gain[:1]):
        torch.library.opcheck(codes_of_rows, (x, given, CODES[kind]), test_utils=("test_schema", "test_faketensor"))
        assert codes_of_rows(x, given, CODES[kind])[0].is_contiguous()


@pytest.mark.parametrize("kind", CODES)
def test_a_kernel_is_tried_in_the_models_dtype_and_its_fault_told_in_a_line(kind: str, monkeypatch) -> None:
    tried, real = [], matmul.multiplied
    monkeypatch.setattr(matmul, "multiplied", lambda x, *given, **named: (
        tried.append(x.dtype), real(x, *given, **named))[1])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert matmul.fault.__wrapped__(kind, torch.device("cpu"), dtype) is None and tried.pop() == dtype
    monkeypatch.delattr(matmul, "codes_of_rows")
    monkeypatch.setattr(matmul, "multiplied", real)
    assert matmul.fault.__wrapped__(kind, torch.device("cpu")) == (
        "the kernel for it could not be made or run here: name 'codes_of_rows' is not defined")


WRONG = {"all": lambda product, x, **given: 1.1 * product(x, **given),
         "signs": lambda product, x, **given: product(x.abs(), **given),
         "own scales": lambda product, x, **given: product(x / x.abs().amax(1, keepdim=True), **given),
         "scales": lambda product, x, **given: product(x, **given | {"scale": given["scale"][:1]}),
         "bias": lambda product, x, **given: product(x, **given | {"bias": None}),
         "pair": lambda product, x, **given: product(x, **given | {"hidden": None, "factor": None}),
         "last row": lambda product, x, **given: product(x, **given) * (torch.arange(len(x)) < len(x) - 1)[:, None]}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", CODES)
def test_a_kernel_that_leaves_something_out_is_found_out(kind: str, wrong: str, monkeypatch) -> None:
    real = matmul.multiplied
    monkeypatch.setattr(matmul, "multiplied", lambda x, codes, **given: WRONG[wrong](real, x, codes=codes, **given))
    assert matmul.fault.__wrapped__(kind, torch.device("cpu")) == "the kernel gives wrong products"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", CODES)
def test_a_kernel_that_adds_with_fourteen_bits_is_right(kind: str, dtype: torch.dtype, monkeypatch) -> None:
    def coarse(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, hidden: Tensor, factor: Tensor) -> Tensor:
        own, own_scale = rows_to_codes(x, codes.dtype)
        products = (own.float() * own_scale)[:, None] * (codes.float() * scale)[None]  # m n k
        step = products.abs().amax() / 2**13
        whole = (products / step).trunc().sum(-1) * step
        return (whole + bias.float() + hidden.float() @ factor.float().t()).to(dtype)

    monkeypatch.setattr(matmul, "multiplied", coarse)
    assert matmul.fault.__wrapped__(kind, torch.device("cpu"), dtype) is None
    monkeypatch.setattr(matmul, "WRONG", matmul.WRONG / 3)
    assert matmul.fault.__wrapped__(kind, torch.device("cpu"), dtype) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", CODES)
def test_linears_stay_near_whole_products_and_trying_out_is_the_same_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    net = Net()
    plain = through(net)
    low = low_of(net, kind)
    matmul.try_out(net, low)
    tried = through(net)
    matmul.stop_trying(net, low)
    assert all(torch.equal(one, other) for one, other in zip(through(net), plain))
    matmul.install(net, low)
    for found, same, whole in zip(through(net), tried, plain):
        assert found.dtype == whole.dtype and torch.equal(found, same)
        assert 1e-4 < distance(found, whole) < 2 * ERROR[kind]
    wide = Net(dtype)
    before = wide.block[0](torch.ones(40, 64, dtype=dtype))
    matmul.install(wide, low)
    assert wide.block[0](torch.ones(40, 64, dtype=dtype)).dtype == dtype == before.dtype


@pytest.mark.parametrize("kind", CODES)
def test_stored_codes_are_multiplied_as_they_are_and_kept_once(kind: str) -> None:
    net = Net(store=kind)
    codes, plain, size = net.block[0][0].codes.clone(), through(net), held(net)
    matmul.install(net, low_of(net, kind))
    assert torch.equal(net.block[0][0].codes.float(), codes.float()) and held(net) == size
    for found, whole in zip(through(net), plain):
        assert distance(found, whole) < 2 * ERROR[kind]
    others = {"nf4", *CODES} - {kind}
    assert all(not matmul.able_linears(Net(store=other), kind) for other in others)


def held(net: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize("kind", CODES)
def test_codes_in_both_orders_take_what_sixteen_bits_took(kind: str) -> None:
    net = Net()
    before, scales = held(net), 4 * (96 + 96)
    matmul.install(net, low_of(net, kind))
    assert held(net) == before + scales


def test_only_sides_that_the_kernels_take_are_able() -> None:
    net = Net()
    net.block.append(nn.Linear(64, 90))
    net.elsewhere = nn.Linear(64, 96)
    assert set(matmul.able_linears(net, "int8")) == {"block.0.0", "block.0.1"}


@pytest.mark.parametrize("kind", CODES)
def test_few_rows_are_multiplied_whole_with_the_codes_weight(kind: str) -> None:
    net = Net()
    matmul.install(net, low_of(net, kind))
    layer, x = net.block[0][0], torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(y) @ layer.weight)


@pytest.mark.parametrize("kind", CODES)
def test_a_row_of_zeros_gives_the_bias_and_one_that_is_not_finite_nothing_finite(kind: str) -> None:
    net = Net()
    matmul.install(net, low_of(net, kind))
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    x[0], x[1, 3], x[2, 3] = 0, torch.inf, torch.nan
    y = net.block[0][0](x)
    assert torch.equal(y[0], net.block[0][0].bias)
    assert not y[1:3].isfinite().any() and y[3:].isfinite().all()


# Under adapters


@pytest.mark.parametrize("method, dora", [("lora", True), ("stiefel", False), ("stella", False), ("stella", True)])
@pytest.mark.parametrize("kind", CODES)
def test_adapters_keep_their_gradients(kind: str, method: str, dora: bool) -> None:
    net = Net()
    first, second = net.block[0]
    adapter = build([Target("first", first, "x"), Target("second", second, "x")], method=method, rank=4, dora=dora)
    adapter.install()
    with torch.no_grad():
        for key, leaf in adapter.leaves.items():
            if key.split(".")[0] in ("up", "core"):
                leaf.add_(torch.randn_like(leaf) / 8)
    expected = gradients(net, adapter)
    matmul.install(net, low_of(net, kind))
    assert low_bits.likeness([gradients(net, adapter)], [expected]) > (0.998 if kind == "fp8" else 0.9998)
    adapter.remove()
    assert type(first) is matmul.LowBitLinear


def gradients(net: nn.Module, adapter: object) -> list[Tensor]:
    adapter.refresh("raw", torch.bfloat16)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    net(x).float().square().mean().backward()
    found = [leaf.grad.clone() for leaf in adapter.parameters()]
    adapter.zero_grad()
    return found


def test_a_layer_with_a_gain_keeps_its_input_once() -> None:
    net, kept = Net(), []
    matmul.install(net, low_of(net, "int8"))
    layer = net.block[0][0]
    adapter = build([Target("first", layer, "x")], method="stella", rank=4, dora=True)
    adapter.install()
    adapter.refresh("raw", torch.bfloat16)
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert {tensor.data_ptr() for tensor in kept if tensor.shape == x.shape} == {x.data_ptr()}


@pytest.mark.parametrize("dora, stored", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", CODES)
def test_the_compiler_takes_the_whole_layer_and_gives_the_same_gradients(kind: str, dora: bool, stored: bool) -> None:
    net = Net(store=kind if stored else "none")
    targets = [Target(name, layer, "x") for name, layer in zip(("first", "second"), net.block[0])]
    adapter = build(targets, method="stella", rank=4, dora=dora)
    adapter.install()
    matmul.install(net, low_of(net, kind))
    plain = gradients(net, adapter)
    compiled = gradients(torch.compile(net, backend="aot_eager", fullgraph=True), adapter)
    for one, other in zip(plain, compiled):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)


def test_stacked_layers_in_checkpointed_blocks_keep_the_adapters_gradients() -> None:
    [row] = step_time.rows_of("flux1-dev:1:full", ["stella"])
    size, device = true_size.shrunk(true_size.SIZES[row.size]), torch.device("cpu")
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, "none", device, torch.float32)
    session = step_time.session_of(size, "stella", [], denoiser, device, torch.float32, row)
    session.order = true_size.SimpleNamespace(batch=partial(true_size.draws, size))
    whole = passes.gradients(session, 1)
    matmul.install(session.denoiser, low_of(session.denoiser, "int8"))
    assert 0.9995 < low_bits.likeness(passes.gradients(session, 1), whole) < 1
