"""Quantised frozen weights on a real GPU: the same codes as on a CPU, no waiting, no weight kept, exact resumes."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import family_runs, models_flux
from tests.bench.host_memory import load_peak, make_shards
from trainer.adapters import Target, build
from trainer.quantize.available import check
from trainer.quantize.linear import FP8, in_one_pass, scaled, whole
from trainer.quantize.model import MODES, quantised_linear, weight_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

GPU, WIDTH, COUNT, TOKENS = torch.device("cuda", 0), 3072, 8, 1024


def weight_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()


def chain(mode: str) -> nn.Sequential:
    """Square layers one after the other, as wide as Flux."""
    if mode == "none":
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16, device=GPU) for _ in range(COUNT)))
        return net.requires_grad_(False)
    weight = weight_of(WIDTH, WIDTH).to(GPU) / WIDTH**0.5
    return nn.Sequential(*(quantised_linear(weight, None, torch.zeros(WIDTH, dtype=torch.bfloat16, device=GPU), mode,
                                            torch.bfloat16) for _ in range(COUNT)))


def adapted(mode: str) -> tuple[nn.Sequential, object]:
    net = chain(mode)
    adapter = build([Target(f"net.{number}", layer, "x") for number, layer in enumerate(net)], method="lora", rank=16,
                    device=GPU)
    adapter.install()
    adapter.refresh("raw", torch.bfloat16)
    return net, adapter


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(96, 128), (13, 11), (300, 65)])
def test_a_gpu_holds_the_weights_that_a_cpu_holds(mode, shape):
    check(mode, GPU)
    weight = weight_of(*shape)
    here, there = (quantised_linear(weight.to(device), None, None, mode, torch.bfloat16) for device in (GPU, "cpu"))
    again = quantised_linear(weight.to(GPU), None, None, mode, torch.bfloat16)
    assert torch.equal(here.weight, again.weight)
    difference = (here.weight.cpu() - there.weight).float().abs()
    assert (difference > 0).float().mean() <= 0.05 and difference.max() <= 0.1 * weight.abs().max()
    held = sum(tensor.numel() * tensor.element_size() for tensor in here.buffers())
    assert held == weight_bytes(shape, mode)


@pytest.mark.parametrize("mode", MODES)
def test_products_and_gradients_are_those_of_the_dequantised_weight_without_waiting(mode):
    layer = quantised_linear(weight_of(256, 512).to(GPU), None, None, mode, torch.bfloat16)
    x = torch.randn(64, 512, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(64, 256, device=GPU, dtype=torch.bfloat16)
    layer(x)  # libraries load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(x)
        y.backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y, F.linear(x, layer.weight))
    torch.testing.assert_close(x.grad, grad @ layer.weight)


@pytest.mark.parametrize("kind", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3072, 3072), (13, 11), (300, 1025)])
def test_a_weight_that_is_made_in_one_pass_is_the_same_to_the_bit(kind, dtype, shape):
    if not in_one_pass(kind, dtype, GPU):
        assert kind == FP8 and torch.cuda.get_device_capability(GPU) < (8, 9)
        return
    codes = (100 * torch.randn(shape, device=GPU)).clamp(-127, 127).to(kind)
    for scale in (torch.rand(shape[0], 1, device=GPU), torch.rand(1, 1, device=GPU)):
        assert torch.equal(whole((codes, scale), shape, dtype), scaled(codes, scale, dtype))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("mode", ["none", *MODES])
def test_a_step_keeps_no_dequantised_weight(mode, compiled):
    """At most one weight in bf16 is there at a time, beside activations of 6 MiB a layer; and how long a step takes."""
    net, _ = adapted(mode)
    forward = torch.compile(net, dynamic=False) if compiled else net
    x = torch.randn(TOKENS, WIDTH, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        forward(x).square().mean().backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak, activation = torch.cuda.max_memory_allocated() - before, 2 * TOKENS * WIDTH
    print(f"\n{mode}{', compiled' * compiled}: forward and backward of {COUNT} layers {WIDTH} x {WIDTH}, {TOKENS} "
          f"tokens: {sorted(seconds)[len(seconds) // 2] * 1e3:.2f} ms, {peak / 2**20:.0f} MiB beside the weights")
    assert peak <= 2.5 * 2 * WIDTH**2 + (COUNT + 6) * activation


@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_the_gpu_resumes_to_the_bit(tmp_path, mode):
    preset = family_runs.project(tmp_path, "flux2", models_flux.klein_folder(tmp_path / "base"))
    family_runs.assert_command_resumes_exactly(
        preset, "adapter.method=stella", f"memory.quantize={mode}", f"memory.quantize_text_encoder={mode}",
        "memory.device=cuda", "train.deterministic=true")


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_loading_to_the_gpu_leaves_the_hosts_memory_alone(tmp_path, mode):
    make_shards(tmp_path, blocks=4, width=4096, shards=2)  # 1 GiB
    measured = load_peak(tmp_path, mode, "cuda")
    print(f"\n{mode}: {measured['weights'] / 2**30:.2f} GiB to the GPU in {measured['seconds']:.2f} s, "
          f"{measured['peak'] / 2**20:.0f} MiB of the host's memory")
    assert measured["peak"] <= 0.25 * measured["shard"]
