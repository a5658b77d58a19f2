"""The kernels of tall stacks give what fp64 gives, and a step with them is a step without them, on a real GPU.

    pytest -m gpu tests/test_gpu_manifold.py
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from trainer import manifold

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda", 0)


@pytest.fixture
def kernels() -> ModuleType:
    from trainer import manifold_kernel  # needs Triton, which is where a GPU is

    return manifold_kernel


def stacks(*shape: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator(GPU).manual_seed(0)
    return [torch.randn(*shape, device=GPU, generator=generator) for _ in range(count)]


def near(found: Tensor, expected: Tensor) -> bool:
    return ((found - expected).norm() <= 2e-6 * expected.norm()).item()


@pytest.mark.parametrize("count, dim, rank", [(480, 1280, 16), (3, 77, 4), (2, 320, 12), (2, 2049, 1)])
def test_products_are_those_of_fp64(kernels: ModuleType, count: int, dim: int, rank: int) -> None:
    x, d = stacks(count, dim, rank)
    assert kernels.fits(x, d)
    [cores] = stacks(count, 2 * rank, rank, count=1)
    of_x, of_d = cores[:, :rank], cores[:, rank:].mT
    across, square = kernels.grams(x, d, square=True).unbind(1)
    assert near(across, x.double().mT @ d.double()) and near(square, d.double().mT @ d.double())
    assert near(kernels.grams(x, d)[:, 0], x.double().mT @ d.double())
    expected = x.double() + x.double() @ of_x.double() + d.double() @ of_d.double()
    assert near(kernels.times_(torch.empty_like(x), x, of_x), x.double() @ of_x.double())
    assert near(kernels.times_(x, x, of_x, d, of_d, add=True), expected)


def test_others_are_left_to_torch(kernels: ModuleType) -> None:
    x, wide = stacks(2, 64, 16, count=1)[0], stacks(2, 64, 17, count=1)[0]
    for stack in (wide, x.double(), x.mT.contiguous().mT, x[:0]):
        assert not kernels.fits(stack)
        assert near(manifold.gram(stack, stack), stack.double().mT @ stack.double())


@pytest.mark.parametrize("dim, rank", [(640, 16), (1280, 4)])
def test_a_small_change_keeps_its_digits(dim: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is summed up by itself: a sum that began with X would round each part to X's last digit."""
    start, grad = stacks(40, dim, rank)
    start = manifold.orthonormalize(start)
    moved, errors = manifold.riemannian_gradient(start, grad) * 1e-4, []
    exact = manifold.polar_retraction(start.double(), moved.double())
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(manifold, "_kernel", lambda *stacks: None)
        manifold.advance_([x := start.clone()], [moved], torch.ones_like, "polar", measure=False)
        errors.append((x - exact).norm().item())
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("measure", [True, False])
def test_a_step_is_that_of_torchs_products(measure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    start, grad = stacks(40, 640, 16)
    start = manifold.orthonormalize(start)
    ends = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(manifold, "_kernel", lambda *stacks: None)
        x, moved = start.clone(), manifold.riemannian_gradient(start, grad) * 1e-3
        [fine] = manifold.advance_([x], [moved], torch.ones_like, "polar", measure=measure)
        assert fine.all() and manifold.orthogonality_error(x) < 1e-6
        ends.append(x)
    assert (ends[0] - ends[1]).abs().max() < 1e-6 < (ends[0] - start).abs().max()
