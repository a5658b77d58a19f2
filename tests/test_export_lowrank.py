"""Singular values and nearest matrices against torch's full SVD in fp64."""

import pytest
import torch

from trainer.export import lowrank


def near_low_rank(m, n, rank, noise=1e-4):
    torch.manual_seed(0)
    return torch.randn(m, rank) @ torch.randn(rank, n) + noise * torch.randn(m, n)


@pytest.mark.parametrize(("m", "n", "r"), [(30, 20, 4), (20, 30, 4), (5, 30, 8), (8, 8, 8), (1, 6, 3)])
def test_factors_have_the_singular_values_of_their_product(m, n, r):
    torch.manual_seed(0)
    up, down = torch.randn(m, r), torch.randn(r, n)
    svd, true = lowrank.of_factors(up, down), torch.linalg.svdvals(up.double() @ down.double())
    torch.testing.assert_close(svd.s, true[: len(svd.s)], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(svd.u * svd.s @ svd.vt, up.double() @ down.double(), rtol=1e-10, atol=1e-10)
    assert torch.allclose(svd.u.T @ svd.u, torch.eye(len(svd.s), dtype=torch.float64), atol=1e-12)
    assert svd.energy == pytest.approx(float((up.double() @ down.double()).square().sum()))
    assert svd.rank == min(m, n, r)


def test_full_rank_gives_the_same_matrix_within_1e_6():
    torch.manual_seed(0)
    up, down = torch.randn(300, 16), torch.randn(16, 200)
    new = lowrank.as_layer(*lowrank.of_factors(up, down).factors(16), (200,))
    true = up.double() @ down.double()
    assert (new[0].double() @ new[1].double() - true).norm() <= 1e-6 * true.norm()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("m", "n"), [(900, 400), (400, 900)])
def test_a_matrix_gives_its_nearest_of_a_rank(m, n, exact):
    matrix = near_low_rank(m, n, 6)
    svd = lowrank.of_matrix(matrix, 4, exact=exact)
    true = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(svd.s, true.S[:4], rtol=1e-5, atol=0)
    error = (svd.u * svd.s @ svd.vt - matrix).norm()
    assert error <= true.S[4:].norm() * (1 + 1e-4)  # Eckart and Young's bound


def test_the_sketch_is_nearly_the_best_where_singular_values_fall_slowly():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(500, 500)).Q for _ in range(2))
    matrix = (u / torch.arange(1, 501) ** 0.5) @ v.T
    true = torch.linalg.svdvals(matrix.double())
    svd = lowrank.of_matrix(matrix, 16)
    error = float((svd.u * svd.s @ svd.vt - matrix).norm() / true[16:].norm())
    assert 1 - 1e-4 <= error <= 1.002
    assert torch.equal(lowrank.of_matrix(matrix, 16).s, svd.s)  # the same each time


def test_fewest_values_for_a_share_of_the_energy():
    s = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1
    shares = {0.6: 1, 9 / 14: 1, 0.7: 2, 13 / 14: 2, 0.99: 3, 1.0: 3}
    assert {share: lowrank.rank_for(s, share, 14.0) for share in shares} == shares
    assert lowrank.rank_for(torch.zeros(3), 0.9, 0.0) == 1
    assert lowrank.rank_for(s, 0.9, 100.0) == 3  # there is no more


def test_more_rank_than_there_is_becomes_zeros():
    up, down = lowrank.of_factors(torch.ones(3, 2), torch.ones(2, 4)).factors(5)
    assert up.shape == (3, 5) and down.shape == (5, 4) and not up[:, 3:].any()


def test_factors_of_a_convolution_keep_their_shape():
    torch.manual_seed(0)
    up, down = torch.randn(8, 3, 1, 1), torch.randn(3, 4, 3, 3)
    new = lowrank.as_layer(*lowrank.of_factors(*lowrank.matrices(up, down)).factors(3), down.shape[1:])
    assert new[0].shape == up.shape and new[1].shape == down.shape
    torch.testing.assert_close(new[0].flatten(1) @ new[1].flatten(1), up.flatten(1) @ down.flatten(1))
