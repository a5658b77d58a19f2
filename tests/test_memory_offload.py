"""Block offload: the same numbers to the bit, fetched in the right order, and memory given back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.adapters import Adapter, Target, build
from trainer.memory.offload import Offload, spread
from trainer.quantize.linear import QuantizedLinear
from trainer.quantize.model import linears_in_blocks, quantised_linear

CPU = torch.device("cpu")
WIDTH, DEPTH = 64, 6


class Part(nn.Module):
    """A block with a layer that takes an adapter, one that does not, and a norm with weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.adapted, self.plain = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.plain(torch.tanh(self.adapted(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.transformer_blocks = nn.ModuleList(Part(width) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = checkpoint(block, x, use_reentrant=False) if torch.is_grad_enabled() else block(x)
        return x


class Recorded(Offload):
    """Writes down what is fetched, and what runs."""

    def __init__(self, *arguments) -> None:
        self.log: list[str] = []
        super().__init__(*arguments)

    def _fetch(self, index: int, buffer: int) -> None:
        self.log.append(f"fetch {index}")
        super()._fetch(index, buffer)

    def _enter(self, index: int) -> None:
        self.log.append(f"run {index}")
        super()._enter(index)
        assert index in self.held


def make(mode: str = "none", device: torch.device = CPU, width: int = WIDTH) -> tuple[Model, Adapter]:
    torch.manual_seed(0)
    model = Model(width).requires_grad_(False).to(device)
    for path, linear in linears_in_blocks(model).items() if mode != "none" else ():
        model.set_submodule(path, quantised_linear(linear.weight, None, linear.bias, mode, torch.float32))
    targets = [Target(f"unet.{number}", block.adapted, "all") for number, block in enumerate(model.transformer_blocks)]
    adapter = build(targets, method="stella", rank=4, device=device)
    adapter.install()
    adapter.refresh()
    return model, adapter


def trained(model: Model, adapter: Adapter, passes: int = 2) -> list[Tensor]:
    """Outputs and gradients of some passes."""
    found = []
    for number in range(passes):
        adapter.zero_grad()
        adapter.refresh()
        inputs = torch.randn(3, model.width, generator=torch.Generator().manual_seed(number))
        y = model(inputs.to(adapter.skip.device))
        y.square().sum().backward()
        found += [y.detach(), *(leaf.grad.clone() for leaf in adapter.parameters())]
    return found


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", ["none", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("count", [1, 3, DEPTH - 1, DEPTH])
def test_training_is_the_same_to_the_bit(mode: str, count: int) -> None:
    expected = trained(*make(mode))
    model, adapter = make(mode)
    Offload(list(model.transformer_blocks), count, CPU)
    assert equal(trained(model, adapter), expected)


def test_each_block_is_fetched_while_the_one_before_it_runs() -> None:
    model, adapter = make()
    offload = Recorded(list(model.transformer_blocks), 4, CPU)
    trained(model, adapter, passes=1)
    assert offload.log == ["run 0", "fetch 0", "fetch 1", "run 1", "fetch 2", "run 2", "fetch 3", "run 3",
                           "run 3", "run 2", "fetch 1", "run 1", "fetch 0", "run 0"]
    offload.log.clear()
    trained(model, adapter, passes=1)
    assert offload.log[:3] == ["run 0", "run 1", "fetch 2"]  # the first two are still here after a backward pass


@pytest.mark.parametrize("mode", ["fp8", "int8", "nf4"])
def test_backward_reads_no_weight_before_its_block_runs_again(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then it may be on its way: `_enter` is what waits for it."""
    model, adapter = make(mode)
    offload = Recorded(list(model.transformer_blocks), DEPTH, CPU)
    layers = {id(block.plain): number for number, block in enumerate(model.transformer_blocks)}
    usual = QuantizedLinear.input_gradient

    def recorded(layer: QuantizedLinear, grad: Tensor) -> Tensor:
        if id(layer) in layers:  # a block's last operation, whose gradient is its first
            offload.log.append(f"gradient {layers[id(layer)]}")
        return usual(layer, grad)

    monkeypatch.setattr(QuantizedLinear, "input_gradient", recorded)
    trained(model, adapter, passes=1)
    order = [entry for entry in offload.log if not entry.startswith("fetch")]
    assert order[DEPTH:] == [f"{what} {number}" for number in reversed(range(DEPTH)) for what in ("run", "gradient")]


def test_without_gradients_the_first_block_follows_the_last() -> None:
    model, _ = make()
    expected = model(torch.ones(2, WIDTH)).detach()
    offload = Recorded(list(model.transformer_blocks), 3, CPU)
    with torch.no_grad():
        first, second = model(torch.ones(2, WIDTH)), model(torch.ones(2, WIDTH))
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert offload.log == ["run 0", "fetch 0", "fetch 1", "run 1", "fetch 2", "run 2", "fetch 0",
                           "run 0", "fetch 1", "run 1", "fetch 2", "run 2", "fetch 0"]


def test_only_two_blocks_are_on_the_device_and_what_blocks_share_stays() -> None:
    model, _ = make()
    shared = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
    for block in model.transformer_blocks:
        block.norm.weight = shared
    offload = Offload(list(model.transformer_blocks), DEPTH, CPU)
    assert len(offload.buffers) == 2
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    hosts = {block.host.untyped_storage().data_ptr() for block in offload.blocks}
    assert len(hosts) == DEPTH and storages == hosts | {shared.untyped_storage().data_ptr()}
    assert offload.host_bytes == DEPTH * (2 * WIDTH * WIDTH * 4 + 3 * WIDTH * 4)


def test_removed_it_leaves_the_model_as_it_was() -> None:
    expected = trained(*make("nf4"))
    model, adapter = make("nf4")
    offload = Offload(list(model.transformer_blocks), 3, CPU)
    trained(model, adapter, passes=1)
    offload.remove()
    assert offload.host_bytes == 0 and not any(block._forward_pre_hooks for block in model.transformer_blocks)
    assert equal(trained(model, adapter), expected)


def test_weights_keep_their_order_in_memory() -> None:
    """A transposed weight, such as fp8 products like, stays transposed."""
    blocks = [nn.Linear(8, 4).requires_grad_(False) for _ in range(3)]
    for block in blocks:
        block.weight.data = torch.randn(8, 4).t()
    kept = [block.weight.clone() for block in blocks]
    Offload(blocks, 3, CPU)
    for block, weight in zip(blocks, kept):
        assert torch.equal(block.weight, weight) and block.weight.stride() == weight.stride() == (1, 4)


@pytest.mark.parametrize(("total", "count", "expected"), [
    (6, 2, [2, 5]), (6, 5, [1, 2, 3, 4, 5]), (4, 4, [0, 1, 2, 3]), (5, 0, []), (7, 3, [2, 4, 6])])
def test_offloaded_blocks_are_spread_evenly(total: int, count: int, expected: list[int]) -> None:
    assert spread(total, count) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("mode", ["none", "fp8", "int8", "nf4"])
def test_on_a_gpu_training_is_the_same_and_holds_two_blocks(mode: str) -> None:
    device = torch.device("cuda")
    plain, offloaded = make(mode, device, 4096), make(mode, device, 4096)
    Offload(list(offloaded[0].transformer_blocks), DEPTH, device)
    for _ in range(3):  # a buffer that is overwritten while in use would show as a difference
        assert equal(trained(*plain, passes=4), trained(*offloaded, passes=4))
