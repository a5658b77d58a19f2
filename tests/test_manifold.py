"""Projections and retractions against their definitions in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer import manifold
from trainer.adapters.bank import MEASURE_EVERY

DTYPES = [torch.float32, torch.float64]
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}
RETRACTIONS = [manifold.polar_retraction, manifold.qr_retraction, manifold.exponential_map]

STEPS = {"polar": manifold.polar_retraction, "exponential": manifold.exponential_map, "qr": manifold.qr_retraction}


def walk(xs: list[Tensor], tentatives: list[Tensor], scales: list[float], kind: str = "polar") -> list[Tensor]:
    """A whole step of several stacks, as an optimizer takes it."""
    updates = [p - x for x, p in zip(xs, tentatives)]
    factors = torch.cat([torch.full((len(x), 1, 1), scale, dtype=torch.float64) for x, scale in zip(xs, scales)])
    ends = [x.clone() for x in xs]
    fine = manifold.advance_(ends, updates, lambda norm: factors, kind)
    return [torch.where(use, end, x) for x, end, use in zip(xs, ends, fine)]


def point(dim: int, rank: int, dtype: torch.dtype = torch.float64, count: int = 2, seed: int = 0) -> Tensor:
    noise = torch.randn(count, dim, rank, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return manifold.orthonormalize(noise)


def tangent(x: Tensor, length: float, seed: int = 1) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    delta = manifold.tangent_projection(x, noise)
    return delta * (length / torch.linalg.matrix_norm(delta, keepdim=True))


sizes = st.integers(1, 12).flatmap(lambda rank: st.tuples(st.integers(rank + 1, 60), st.just(rank)))
lengths = st.floats(1e-6, 0.69)
bounded = settings(max_examples=40, deadline=None, derandomize=True)


@bounded
@given(sizes, st.sampled_from(DTYPES))
def test_the_projection_is_tangent_and_idempotent(size, dtype):
    x = point(*size, dtype)
    once = tangent(x, 1.0)
    assert (x.mT @ once + once.mT @ x).abs().max() <= 4 * LIMIT[dtype]
    assert (manifold.tangent_projection(x, once) - once).abs().max() <= LIMIT[dtype]


@bounded
@given(sizes, lengths, st.sampled_from(DTYPES), st.sampled_from(RETRACTIONS))
def test_retractions_end_on_the_manifold_in_the_dtype_of_the_input(size, length, dtype, retract):
    x = point(*size, dtype)
    y = retract(x, tangent(x, length))
    assert y.dtype == dtype
    assert manifold.orthogonality_error(y) <= LIMIT[dtype]


@bounded
@given(sizes, st.sampled_from(RETRACTIONS))
def test_retractions_are_exact_to_first_order(size, retract):
    x = point(*size)
    t = 1e-4
    gap = (retract(x, tangent(x, t)) - x - tangent(x, t)).abs().max()
    assert gap <= 2 * t**2


@bounded
@given(sizes, lengths)
def test_the_polar_retraction_is_the_polar_factor_of_the_svd(size, length):
    x = point(*size)
    delta = tangent(x, length)
    left, _, right = torch.linalg.svd(x + delta, full_matrices=False)
    assert (manifold.polar_retraction(x, delta) - left @ right).abs().max() <= 1e-12


@bounded
@given(sizes, lengths)
def test_the_qr_retraction_is_householder_qr_with_positive_diagonal(size, length):
    x = point(*size)
    delta = tangent(x, length)
    q, r = torch.linalg.qr(x + delta)
    expected = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    assert (manifold.qr_retraction(x, delta) - expected).abs().max() <= 1e-12


@bounded
@given(sizes, lengths)
def test_the_exponential_map_is_the_canonical_geodesic(size, length):
    x = point(*size)
    delta = tangent(x, length)
    a = x.mT @ delta
    q, r = torch.linalg.qr(delta - x @ a)
    turn = torch.cat([torch.cat([a, -r.mT], -1), torch.cat([r, torch.zeros_like(r)], -1)], -2)
    expected = (torch.cat([x, q], -1) @ torch.matrix_exp(turn))[..., : size[1]]
    assert (manifold.exponential_map(x, delta) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("step, retract", STEPS.items())
def test_a_whole_step_is_scaling_projection_and_retraction_in_turn(step, retract):
    x = point(40, 6)
    tentative = x + 0.05 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    expected = retract(x, manifold.tangent_projection(x, 0.7 * (tentative - x)))
    assert (walk([x], [tentative], [0.7], step)[0] - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("step", STEPS)
def test_stacks_of_several_sizes_step_together_as_each_would_alone(step):
    xs = [point(40, 3), point(9, 3, count=1), point(25, 3, count=4)]
    tentatives, scales = [x + 0.02 * torch.sin(x * 50) for x in xs], [1.0, 0.5, 2.0]
    for x, p, scale, y in zip(xs, tentatives, scales, walk(xs, tentatives, scales, step)):
        assert (walk([x], [p], [scale], step)[0] - y).abs().max() <= 1e-14


def test_the_riemannian_gradient_gives_every_tangent_direction_its_derivative():
    x, grad = point(30, 4), torch.randn(2, 30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    direction, gradient = tangent(x, 1.0), manifold.riemannian_gradient(x, grad)
    half = torch.eye(30, dtype=x.dtype) - x @ x.mT / 2  # canonical metric: <a, b> = tr(a^T (I - X X^T / 2) b)
    inner = (gradient * (half @ direction)).sum((-2, -1))
    assert torch.allclose(inner, (grad * direction).sum((-2, -1)), atol=1e-12)
    assert (x.mT @ gradient + gradient.mT @ x).abs().max() <= 1e-12


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_update_leaves_only_its_own_matrix_where_it_was(step, bad):
    x = point(20, 3, torch.float32, count=3)
    tentative = x + 0.01
    tentative[1, 4, 2] = bad
    y = walk([x], [tentative], [1.0], step)[0]
    assert torch.equal(y[1], x[1])
    assert not torch.equal(y[0], x[0])
    assert manifold.orthogonality_error(y) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_a_huge_update_still_ends_on_the_manifold(step, dtype):
    x = point(50, 8, dtype)
    noise = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    y = walk([x], [x + 30 * noise], [1.0], step)[0]
    assert manifold.orthogonality_error(y) <= LIMIT[dtype]
    assert not torch.equal(y, x)


def test_ten_thousand_steps_do_not_drift_from_the_manifold():
    x, generator = point(24, 4, torch.float32), torch.Generator().manual_seed(0)
    for _ in range(10_000):
        x, = walk([x], [x + 0.01 * torch.randn(x.shape, generator=generator)], [1.0])
    assert manifold.orthogonality_error(x) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("step, dim, rank", [("polar", 320, 16), ("polar", 320, 64), ("polar", 192, 128),
                                             ("qr", 320, 64), ("exponential", 320, 16)])
def test_ten_thousand_steps_at_high_ranks_do_not_drift_either(step, dim, rank):
    x, generator = point(dim, rank, torch.float32, count=1), torch.Generator().manual_seed(0)
    for _ in range(10_000):
        x, = walk([x], [x + 2e-3 * torch.randn(x.shape, generator=generator)], [1.0], step)
    assert manifold.orthogonality_error(x) <= 1e-6


@pytest.mark.parametrize("step", STEPS)
def test_rank_128_stays_on_the_manifold(step):
    x, generator = point(640, 128, torch.float32, count=1), torch.Generator().manual_seed(0)
    for _ in range(20):
        x, = walk([x], [x + 1e-3 * torch.randn(x.shape, generator=generator)], [1.0], step)
    assert manifold.orthogonality_error(x) <= 1e-6


@pytest.mark.parametrize("dim", [320, 1280, 1009, 27648])
def test_a_gram_matrix_in_pieces_is_that_of_fp64(dim):
    x = torch.randn(1, dim, 16, generator=torch.Generator().manual_seed(0)) / dim**0.5
    exact = x.double().mT @ x.double()
    assert (manifold.gram(x, x, torch.float64) - exact).abs().max() <= 2e-7
    assert (manifold.gram(x.double(), x.double()) - exact).abs().max() <= 1e-13


def test_pieces_divide_a_length_and_are_not_small():
    sizes = {dim: manifold.piece(dim, 128) for dim in (10, 128, 320, 1280, 2880, 27648, 1009, 2 * 1009)}
    assert sizes == {10: 10, 128: 128, 320: 80, 1280: 128, 2880: 120, 27648: 128, 1009: 0, 2018: 0}


def test_a_start_off_the_manifold_is_mended_in_one_step():
    x = point(320, 16, torch.float32).to(torch.bfloat16).float()
    assert manifold.orthogonality_error(x) > 1e-4
    assert manifold.orthogonality_error(walk([x], [x + 1e-4], [1.0])[0]) <= 1e-6


def test_autocast_and_reduced_precision_do_not_reach_the_manifold():
    x = point(40, 5, torch.float32)
    expected = walk([x], [x + 0.01], [1.0])[0]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = walk([x], [x + 0.01], [1.0])[0]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(result, expected)


def test_orthonormalize_finds_the_nearest_and_completes_a_deficient_rank():
    x = torch.randn(2, 30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    assert (manifold.orthonormalize(x) - left @ right).abs().max() <= 1e-12
    x[0, :, 1] = x[0, :, 2]
    assert manifold.orthogonality_error(manifold.orthonormalize(x)) <= 1e-12
    assert manifold.orthogonality_error(manifold.orthonormalize(torch.zeros(1, 9, 3))) <= 1e-6


def test_unmeasured_steps_drift_by_rounding_alone_and_a_measured_one_mends_it():
    x, generator = point(64, 8, torch.float32, count=4), torch.Generator().manual_seed(0)
    drifts = []
    for number in range(40 * MEASURE_EVERY + 1):
        update = 0.01 * torch.randn(x.shape, generator=generator)  # 0.2 long: more than training takes
        manifold.advance_([x], [update], torch.ones_like, "polar", measure=number == 40 * MEASURE_EVERY)
        drifts.append(float(manifold.orthogonality_error(x)))
    assert max(drifts[:MEASURE_EVERY]) <= 2e-7
    assert drifts[-1] <= 3e-7 < 0.5 * drifts[-2]


def test_a_step_that_is_not_taken_keeps_every_bit():
    x = 1.001 * point(20, 3, torch.float32)
    y = x.clone()
    manifold.advance_([y], [torch.ones_like(x)], torch.ones_like, "qr", skip=torch.tensor(True))
    assert torch.equal(x, y)
