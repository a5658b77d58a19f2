"""Singular values of changes of weight: from the factors by r x r matrices, from a whole matrix by its right space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

OVERSAMPLING = 16  # columns of the sketch beyond the rank that is asked for
POWER_STEPS = 3  # of the sketch; each makes falling singular values fall faster
SMALL = 4  # a matrix with fewer than this times the sketch's columns is cheaper to decompose exactly
GRAM_ROWS = 2048  # at a time, in fp64


@dataclass(frozen=True)
class Svd:
    """A matrix u diag(s) vt in fp64: u [m, k] and vt [k, n] orthonormal, s [k] falling."""

    u: Tensor
    s: Tensor
    vt: Tensor

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        return float(self.s.square().sum())

    @property
    def rank(self) -> int:
        """Singular values that are more than rounding of fp32 factors; at least 1."""
        return max(1, int((self.s > 1e-7 * self.s[0]).sum()))

    def lost(self, rank: int) -> float:
        """The part of `energy` beyond the first `rank` singular values."""
        return float(self.s[rank:].square().sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """up [m, rank] and down [rank, n] of the nearest matrix of that rank (Eckart and Young 1936), equally large.

        A matrix that has no so many singular values gets zeros.
        """
        root = self.s[:rank].sqrt()
        up, down = self.u[:, :rank] * root, root[:, None] * self.vt[:rank]
        return F.pad(up, (0, rank - up.shape[1])), F.pad(down, (0, 0, 0, rank - len(down)))


def of_factors(up: Tensor, down: Tensor) -> Svd:
    """Of up [m, r] times down [r, n], without the m x n product: QR of both, and an SVD of r x r."""
    left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, s, vt = torch.linalg.svd(left.R @ right.R.T)
    return Svd(left.Q @ u[:, : len(s)], s, vt[: len(s)] @ right.Q.T)


def of_matrix(matrix: Tensor, rank: int, *, exact: bool = False) -> Svd:
    """The `rank` largest singular values of a matrix [m, n] in fp32, with their vectors.

    By a randomised sketch (Halko, Martinsson and Tropp 2011, algorithm 4.4, with a fixed seed), or exactly, by
    the eigenvectors of the smaller Gram matrix in fp64: always so where the matrix is small.
    """
    m, n = matrix.shape
    if m < n:
        turned = of_matrix(matrix.T, rank, exact=exact)
        return Svd(turned.vt.T, turned.s, turned.u.T)
    rank = min(rank, n)
    columns = rank + OVERSAMPLING
    space = _eigenvectors(matrix, rank) if exact or n <= SMALL * columns else _sketch(matrix, columns)
    found = of_factors(matrix.double() @ space if n <= GRAM_ROWS else (matrix @ space.float()), space.T)
    return Svd(found.u[:, :rank], found.s[:rank], found.vt[:rank])


def _eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis [n, rank] of the right singular space, in fp64."""
    gram = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for rows in matrix.split(GRAM_ROWS):
        rows = rows.double()
        gram += rows.T @ rows
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)


def _sketch(matrix: Tensor, columns: int) -> Tensor:
    """An orthonormal basis [n, columns] of nearly the right singular space, in fp64."""
    generator = torch.Generator().manual_seed(0)
    space = matrix.T @ torch.randn(len(matrix), columns, generator=generator)  # n columns
    for _ in range(POWER_STEPS):
        space = matrix.T @ torch.linalg.qr(matrix @ torch.linalg.qr(space).Q).Q
    return torch.linalg.qr(space.double()).Q


def rank_for(s: Tensor, share: float, total: float) -> int:
    """The fewest of the falling singular values whose squares make up this share of `total`; at least 1."""
    kept = s.square().cumsum(0)
    enough = (kept >= share * total * (1 - 1e-12)).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(s)


def matrices(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a convolution, up [m, r, 1, 1] and down [r, c, k, k], as matrices; a linear layer's as they are.
    """
    return up.flatten(1), down.flatten(1)


def as_layer(up: Tensor, down: Tensor, kernel: torch.Size) -> tuple[Tensor, Tensor]:
    """Matrices as the factors of a layer in fp32; kernel: (c, k, k) of a convolution's down, or (n,)."""
    up, down = up.float(), down.float().unflatten(1, tuple(kernel))
    return (up[:, :, None, None] if len(kernel) > 1 else up), down.contiguous()
