"""Products in 8 bits on a real GPU: right, without waiting, alike in graphs and compiled blocks, exact in a resume.

    pytest -m gpu tests/test_gpu_matmul.py
"""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import family_runs, models_flux
from tests.test_gpu_fast import assert_same, of, steps, tiny
from trainer.fast import low_bits, matmul
from trainer.fast.matmul import CODES, LowBits
from trainer.fast.product import codes_of_rows, product_of_codes
from trainer.quantize.linear import rows_to_codes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

GPU = torch.device("cuda", 0)
LARGE = "low_bits.SIDE = low_bits.ROWS = low_bits.WORK = 1"  # tiny layers count as large ones
LIKE = {"fp8": 0.998, "int8": 0.9995}  # cosine of gradients, of tiny transformers
STEP = {"fp8": 32, "int8": 1}  # between the largest codes
NEAR = {"fp8": 0.02, "int8": 0.003}  # of losses, relative: what rounding inputs and weights may change


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIDE", "ROWS", "WORK"):
        monkeypatch.setattr(low_bits, name, 1)


@pytest.fixture(params=CODES)
def kind(request: pytest.FixtureRequest) -> str:
    if fault := matmul.fault(request.param, GPU):
        pytest.skip(f"{request.param}: {fault}")
    return request.param


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("rows, n, m, rank", [(33, 64, 96, 0), (77, 3072, 1024, 24), (4097, 3072, 3072, 16),
                                              (300, 144, 80, 100), (4608, 12288, 3072, 4)])
def test_products_are_those_of_the_codes(kind: str, rows: int, n: int, m: int, rank: int) -> None:
    torch.manual_seed(0)
    make = partial(torch.randn, device=GPU, dtype=torch.bfloat16)
    x, weight, bias, grad = make(rows, n) * make(rows, 1), make(m, n), make(m), make(rows, m)
    hidden, up, down = (make(size, rank) for size in (rows, m, n)) if rank else (None, None, None)
    codes, scale = rows_to_codes(weight, CODES[kind])
    own, own_scale = rows_to_codes(x, CODES[kind])
    exact = (own.double() * own_scale) @ (codes.double() * scale).t() + bias
    exact = exact + hidden.double() @ up.double().t() if rank else exact
    assert distance(matmul.multiplied(x, codes, scale=scale, bias=bias, hidden=hidden, factor=up), exact) < 0.005
    back = matmul.multiplied(grad, codes.t().contiguous(), gain=scale, hidden=hidden, factor=down)
    exact = grad.float() @ weight.float() + (hidden.float() @ down.float().t() if rank else 0)
    assert distance(back, exact) < 0.05
    if kind == "int8":  # FP8's tensors cannot be compared, which the check of the schema does
        torch.library.opcheck(product_of_codes, (own, codes, own_scale, scale, bias, hidden, up, torch.bfloat16),
                              test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("m, k", [(5, 64), (100, 3072), (33, 27648), (3, 70000)])
def test_codes_made_by_the_kernel_are_those_of_plain_operations(kind: str, m: int, k: int) -> None:
    x, gain = torch.randn(m, 2 * k, device=GPU).bfloat16()[:, :k], torch.rand(k, 1, device=GPU)
    x[0] = 0
    for given in (None, gain, gain[:1]):
        codes, own = codes_of_rows(x, given, CODES[kind])
        plain, scale = rows_to_codes(x if given is None else x.float() * given.t(), CODES[kind])
        torch.testing.assert_close(own, scale, rtol=1e-6, atol=0)
        away = (codes.float() - plain.float()).abs()
        assert (away > 0).sum() <= 1 + m * k / 200 and away.max() <= STEP[kind]  # a division may round otherwise
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    codes, own = codes_of_rows(x, None, CODES[kind])
    assert own[1:3].isfinite().tolist() == [[False], [False]]
    torch.library.opcheck(codes_of_rows, (x, gain, CODES[kind]), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_in_every_dtype_at_odd_sides_from_inputs_in_any_order(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make = partial(torch.randn, device=GPU, dtype=dtype)
    x, weight, hidden, factor = make(208, 130).t(), make(208, 16).t(), make(100, 130).t(), make(100, 16).t()
    x[7, 5] = torch.nan
    codes, scale = rows_to_codes(weight, CODES[kind])
    for given in (scale, scale[:1]):
        own, own_scale = rows_to_codes(x, CODES[kind])
        exact = (own.double() * own_scale) @ (codes.double() * given).t() + hidden.double() @ factor.double().t()
        y = matmul.multiplied(x, codes, scale=given, hidden=hidden, factor=factor)
        there = torch.arange(130, device=GPU) != 7
        assert y.dtype == dtype and y[7].isnan().all()
        assert distance(y[there], exact[there]) < (2e-3 if dtype == torch.float32 else 0.005)
    assert matmul.fault(kind, GPU, dtype) is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_products_run_on_the_gpu_of_their_tensors(kind: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 128), torch.randn(96, 128)
    found = []
    for device in (GPU, torch.device("cuda", 1)):
        assert matmul.fault(kind, device) is None
        codes, scale = rows_to_codes(weight.to(device), CODES[kind])
        found.append(matmul.multiplied(x.to(device), codes, scale=scale))
        assert found[-1].device == device and torch.cuda.current_device() == GPU.index
    assert torch.equal(found[0].cpu(), found[1].cpu())


def chain(count: int = 6, width: int = 3072) -> nn.Module:
    layers = [nn.Linear(width, width, device=GPU, dtype=torch.bfloat16) for _ in range(count)]
    net = nn.Module()
    net.block = nn.ModuleList([nn.Sequential(*layers)])
    return net.requires_grad_(False)


def test_passes_never_wait_hold_no_more_memory_and_are_timed(kind: str) -> None:
    net, x = chain(), torch.randn(4608, 3072, device=GPU, dtype=torch.bfloat16, requires_grad=True)

    def passes() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        net.block[0](x).backward(x.detach())
        torch.cuda.synchronize()
        return time.perf_counter() - began

    before = sorted(passes() for _ in range(12))[6]
    weights = torch.cuda.memory_allocated()
    low = LowBits(kind, frozenset(matmul.able_linears(net, kind)))
    matmul.install(net, low)
    assert torch.cuda.memory_allocated() <= weights + 2**20 * len(low.paths)  # the allocator rounds a tensor up
    after = sorted(passes() for _ in range(12))[6]
    torch.cuda.set_sync_debug_mode("error")
    try:
        net.block[0](x).backward(x.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print(f"\n{kind}: forward and backward of 6 layers 3072 x 3072, 4608 rows: {1000 * after:.2f} ms, in 16 bits "
          f"{1000 * before:.2f} ms")


WAYS = [("stella", "klein-4b:1"), ("lora", "flux1-dev:1:full"), ("stella", "sd15:2:none:fp8"), ("lora", "sdxl:1")]


@pytest.mark.parametrize("way", WAYS, ids=[" ".join(way) for way in WAYS])
def test_steps_stay_near_those_of_whole_products_and_graphs_change_nothing(exact, large, kind: str, way) -> None:
    if way[1].endswith("fp8") and kind != "fp8":
        pytest.skip("a model in FP8 multiplies in FP8")
    whole, low, graphs = (steps(*tiny(*way, *changes)) for changes in (
        ("memory.cuda_graphs=off", "train.matmul=off"), ("memory.cuda_graphs=off", f"train.matmul={kind}"),
        ("memory.cuda_graphs=on", f"train.matmul={kind}")))
    [note] = [note for note in low[2] if "frozen layers multiply in" in note]
    print(f"\n{way}: {note}")
    if way[1].startswith(("klein", "flux")):  # a tiny U-Net of random weights hardly has gradients
        assert float(re.search(r"cosine of ([\d.]+)", note)[1]) > LIKE[kind]
    assert graphs[2][-1] == "1 graphs", graphs[2]
    assert_same(graphs, low)
    torch.testing.assert_close(torch.tensor(low[0]), torch.tensor(whole[0]), rtol=NEAR[kind], atol=1e-3)


def test_compiled_blocks_multiply_alike(exact, large, kind: str) -> None:
    way = "stella", "klein-4b:1", "memory.cuda_graphs=off", f"train.matmul={kind}"
    plain, fast = steps(*tiny(*way)), steps(*tiny(*way, "train.compile=on"))
    assert any("blocks are compiled" in note for note in fast[2]), fast[2]
    torch.testing.assert_close(torch.tensor(fast[0]), torch.tensor(plain[0]), rtol=NEAR[kind], atol=1e-3)


@pytest.mark.parametrize("kind, compiled", [("fp8", "off"), ("int8", "off"), ("fp8", "on"), ("int8", "on")])
def test_a_run_resumes_to_the_bit(tmp_path: Path, kind: str, compiled: str) -> None:
    if fault := matmul.fault(kind, GPU):
        pytest.skip(f"{kind}: {fault}")
    preset = family_runs.project(tmp_path, "flux2", models_flux.klein_folder(tmp_path / "base"))
    program = f"import sys; from trainer import __main__; from trainer.fast import low_bits; {LARGE}; " \
              "sys.exit(__main__.main())"
    again = family_runs.assert_command_resumes_exactly(
        preset, "adapter.method=stella", f"train.matmul={kind}", f"train.compile={compiled}", "memory.device=cuda",
        "train.deterministic=true", program=("-c", program))
    assert any("as they did before" in event["text"] for event in of(again, "note"))
