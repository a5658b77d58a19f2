"""The Stiefel manifold St(r, d) = {X in R^{d x r}: X^T X = I}: gradients, projections and retractions on stacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

TRUST_RADIUS = 0.7  # Frobenius norm of a step beyond which it is shortened; training steps are about lr*sqrt(dim*rank)
RESIDUAL_LIMIT = 1e-3  # a retraction that misses the manifold by more than this is not taken
FP64_GRAM_DIM = 640  # up to here a Gram matrix in fp64 costs next to nothing on any device
FULL_RATE_FP64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities whose fp64 is half of fp32 or better


Stacks = Sequence[Tensor]


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 and no bf16 inside fp32 products: both break orthonormality at 2e-4."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def sym(a: Tensor) -> Tensor:
    """Symmetric part of a stack of square matrices."""
    return (a + a.mT) / 2


def riemannian_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """grad - X (grad^T X), all [L, dim, r]: the gradient in the canonical metric (StelLA, eq. for the pre-step)."""
    with exact_arithmetic(x.device):
        return torch.baddbmm(grad, x, grad.mT @ x, alpha=-1)


def tangent_projection(x: Tensor, delta: Tensor) -> Tensor:
    """delta - X sym(X^T delta), all [L, dim, r]: onto the tangent space at x, in the Euclidean metric."""
    with exact_arithmetic(x.device):
        return torch.baddbmm(delta, x, sym(x.mT @ delta), alpha=-1)


def polar_retraction(x: Tensor, delta: Tensor) -> Tensor:
    """The orthonormal factor of X + delta for a tangent delta, all [L, dim, r]; keeps x where that would fail.

    Coupled Newton-Schulz on the r x r Gram matrix, which for a tangent step has eigenvalues in [1, 1 + |delta|^2].
    """
    with exact_arithmetic(x.device):
        talls, gram = _talls_and_gram([x], [delta])
        return _apply(talls, _identity_over_identity(gram), gram, [x])[0]


def polar_step(xs: Stacks, tentatives: Stacks, scales: Sequence[float]) -> list[Tensor]:
    """StelLA's whole post-step in two tall products a stack: project scale * (tentative - x), retract by polar.

    Lists of stacks [L, dim, r] of any L and dim and one r, whose r x r work runs as one batch. Equal to
    `polar_retraction(x, tangent_projection(x, scale * (tentative - x)))` of each.
    """
    with exact_arithmetic(xs[0].device):
        talls, gram = _talls_and_gram(xs, _updates(xs, tentatives, scales))
        return _apply(talls, _projected(gram), gram, xs)


def exponential_map(x: Tensor, delta: Tensor) -> Tensor:
    """The geodesic of the canonical metric from x along a tangent delta, all [L, dim, r] (Edelman et al. 1998, 2.4).

    With A = X^T delta and N = delta - X A the end is [X N] exp([[A, -N^T N], [I, 0]]) [I; 0]: no QR is needed.
    """
    with exact_arithmetic(x.device):
        talls, gram = _talls_and_gram([x], [delta])
        return _apply(talls, _geodesic(gram, _identity_over_identity(gram)), gram, [x])[0]


def exponential_step(xs: Stacks, tentatives: Stacks, scales: Sequence[float]) -> list[Tensor]:
    """Like `polar_step`, along the geodesic instead of by the polar factor."""
    with exact_arithmetic(xs[0].device):
        talls, gram = _talls_and_gram(xs, _updates(xs, tentatives, scales))
        return _apply(talls, _geodesic(gram, _projected(gram)), gram, xs)


def qr_retraction(x: Tensor, delta: Tensor) -> Tensor:
    """Q of X + delta = QR with diag(R) > 0 for a tangent delta, all [L, dim, r]; keeps x where that would fail."""
    return qr_retractions([x], [delta])[0]


def qr_retractions(xs: Stacks, deltas: Stacks) -> list[Tensor]:
    """`qr_retraction` of each of a list of stacks of one r, the r x r work as one batch: Q = (X + delta) R^-1."""
    with exact_arithmetic(xs[0].device):
        talls = [x + _shortened(delta) for x, delta in zip(xs, deltas)]
        gram = torch.cat([_gram(tall) for tall in talls])
        return _guarded(talls, _inverse_cholesky(gram, 5 if xs[0].dtype == torch.float64 else 4), gram, xs)


def qr_step(xs: Stacks, tentatives: Stacks, scales: Sequence[float]) -> list[Tensor]:
    """Like `polar_step`, with the QR retraction."""
    return qr_retractions(xs, [tangent_projection(x, d) for x, d in zip(xs, _updates(xs, tentatives, scales))])


def orthonormalize(x: Tensor) -> Tensor:
    """The nearest orthonormal stack in fp64, [L, dim, r] -> [L, dim, r]; for starts and loads, not for steps.

    A rank-deficient matrix is completed by arbitrary orthonormal columns. May wait for the device.
    """
    with exact_arithmetic(x.device):
        y = x.double()
        for _ in range(2):  # the second pass removes what the Gram matrix of an ill-conditioned x has lost
            values, vectors = torch.linalg.eigh(y.mT @ y)
            y = y @ (vectors / values.clamp_min(torch.finfo(values.dtype).tiny).sqrt().unsqueeze(-2)) @ vectors.mT
        if not orthogonality_error(y) < 1e-12:  # rank-deficient or non-finite
            left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
            y = left @ right
        return y.to(x.dtype)


def orthogonality_error(x: Tensor) -> Tensor:
    """max |X^T X - I| over a stack [L, dim, r], in fp64, as a scalar on the device."""
    with exact_arithmetic(x.device):
        gram = x.double().mT @ x.double()
        return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax()


# -- r x r work: always in fp64, [L, r, r] or [L, 2r, 2r]; every function below is free of host synchronisation ----


def _fp64_gram(tall: Tensor) -> bool:
    if tall.device.type != "cuda" or tall.shape[-2] <= FP64_GRAM_DIM:
        return True
    return torch.cuda.get_device_capability(tall.device) in FULL_RATE_FP64


def _gram(tall: Tensor) -> Tensor:
    if _fp64_gram(tall):
        tall = tall.double()
    return (tall.mT @ tall).double()


def _updates(xs: Stacks, tentatives: Stacks, scales: Sequence[float]) -> list[Tensor]:
    """scale * (tentative - x): formed here, since a difference of Gram matrices would cancel."""
    return [(tentative - x) * scale for x, tentative, scale in zip(xs, tentatives, scales)]


def _shortened(delta: Tensor) -> Tensor:
    """delta, cut to the trust radius: within it the fixed iterations below converge, and training stays within."""
    return delta * (TRUST_RADIUS / torch.linalg.matrix_norm(delta, keepdim=True)).clamp(max=1.0)


def _talls_and_gram(xs: Stacks, deltas: Stacks) -> tuple[list[Tensor], Tensor]:
    """[X D] of each and the Gram matrices of all."""
    talls = [torch.cat([x, _shortened(delta)], dim=-1) for x, delta in zip(xs, deltas)]  # L d 2r
    return talls, torch.cat([_gram(tall) for tall in talls])


def _identity_over_identity(gram: Tensor) -> Tensor:
    eye = torch.eye(gram.shape[-1] // 2, dtype=gram.dtype, device=gram.device).expand(gram.shape[0], -1, -1)
    return torch.cat([eye, eye], dim=-2)  # L 2r r


def _projected(gram: Tensor) -> Tensor:
    """Coefficients C with [X D] C = X + (D - X sym(X^T D))."""
    rank = gram.shape[-1] // 2
    combine = _identity_over_identity(gram)
    return torch.cat([combine[:, :rank] - sym(gram[:, :rank, rank:]), combine[:, rank:]], dim=-2)


def _geodesic(gram: Tensor, combine: Tensor) -> Tensor:
    """Coefficients of the geodesic's end in terms of [X D], where [X D] combine = X + delta."""
    rank = combine.shape[-1]
    eye, zero = _identity_over_identity(gram)[:, :rank], torch.zeros_like(combine[:, :rank])
    step = combine - torch.cat([eye, zero], dim=-2)  # [X D] step = delta
    along = gram[:, :rank] @ step  # A = X^T delta
    normal = step - torch.cat([along, zero], dim=-2)  # [X D] normal = N
    turn = torch.cat([torch.cat([along, -(normal.mT @ gram @ normal)], dim=-1), torch.cat([eye, zero], dim=-1)], dim=-2)
    end = _matrix_exponential(turn)[:, :, :rank]  # L 2r r
    return torch.cat([end[:, :rank], zero], dim=-2) + normal @ end[:, rank:]


def _matrix_exponential(a: Tensor, halvings: int = 5, order: int = 12) -> Tensor:
    """exp(a) by scaling and squaring with a fixed Taylor order: torch.matrix_exp waits for the device."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    scaled, result = a / 2**halvings, eye
    for k in range(order, 0, -1):
        result = torch.baddbmm(eye, scaled, result, alpha=1 / k)
    for _ in range(halvings):
        result = result @ result
    return result


def _inverse_sqrt(gram: Tensor, iterations: int) -> Tensor:
    """gram^(-1/2) by coupled Newton-Schulz (Higham 2008, eq. 6.35) for eigenvalues in (0, 3)."""
    bound = torch.linalg.matrix_norm(gram, ord=float("inf"), keepdim=True)
    bound = torch.where(bound >= 2.5, bound, 1.0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    p, z = gram / bound, eye
    for _ in range(iterations):
        t = torch.baddbmm(eye, eye, p, beta=1.5, alpha=-0.5)
        z, p = z @ t, t @ p @ t
    return z / bound.sqrt()


def _inverse_cholesky(gram: Tensor, iterations: int) -> Tensor:
    """R^-1 of gram = R^T R, R upper triangular with positive diagonal, by Newton's method from the identity.

    With Z the estimate and E = Z^T gram Z - I, the factor of I + E is I + P to first order, P + P^T = E and P upper
    triangular; Z (I + P)^-1 squares the error. Products only: batched Cholesky on a GPU may wait for the device.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    upper = torch.ones_like(eye[0]).triu() - eye[0] / 2
    z = eye
    for _ in range(iterations):
        p = (z.mT @ gram @ z - eye) * upper
        z = z - z @ (p - p @ p)
    return z


def _apply(talls: Stacks, combine: Tensor, gram: Tensor, xs: Stacks) -> list[Tensor]:
    """[X D] C (C^T K C)^(-1/2): the polar factor of [X D] C, which also removes what rounding left in X."""
    inner = sym(combine.mT @ gram @ combine)
    iterations = 7 if xs[0].dtype == torch.float64 else 4  # 4 reach 1e-7 for every step within the trust radius
    return _guarded(talls, combine @ _inverse_sqrt(inner, iterations), gram, xs)


def _guarded(talls: Stacks, combine: Tensor, gram: Tensor, xs: Stacks) -> list[Tensor]:
    """tall @ combine where that lies on the manifold, else x: per matrix, on the device."""
    product = sym(combine.mT @ gram @ combine)
    eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    good = (product - eye).abs().amax(dim=(-2, -1), keepdim=True) < RESIDUAL_LIMIT  # false for NaN as well
    counts, combine = [len(x) for x in xs], combine.to(xs[0].dtype)
    return [torch.where(fine, tall @ piece, x)
            for tall, piece, fine, x in zip(talls, combine.split(counts), good.split(counts), xs)]
