"""The Stiefel manifold St(r, d) = {X in R^{d x r}: X^T X = I}: gradients, projections and retractions on stacks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import cycle
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

TRUST_RADIUS = 0.7  # Frobenius norm of a step beyond which it is shortened; training steps are about lr*sqrt(dim*rank)
DOMAIN = 0.6  # |Y^T Y - I| of what is retracted, beyond which the step is not taken; 0.49 at the trust radius
# (1 + f)^(-1/2) - 1 = f * polynomial, to 8e-8 for f in [-0.02, 0.5]: a minimax fit, whose error falls with f.
INVERSE_ROOT = (-0.499999741507, 0.37488891351, -0.310161995225, 0.254679532511, -0.171433664253, 0.0630000314815)

Stacks = Sequence[Tensor]
Step = Callable[[Tensor], Tensor]  # norms of updates [L, 1, 1] -> factors to take them by


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast (which the meta device knows not), no TF32 and no bf16 inside fp32 products: both break
    orthonormality at 2e-4."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def sym(a: Tensor) -> Tensor:
    """Symmetric part of a stack of square matrices."""
    return (a + a.mT) / 2


def gram(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """left^T right, [L, dim, a] and [L, dim, b] -> [L, a, b], summed up in `dtype` (the input's when None).

    Rows are multiplied piece by piece: a sum over 64 to 256 rows keeps fp32 within 2e-7 of fp64 when the pieces are
    added in fp64, and a GPU works on all pieces at once instead of walking down each tall matrix.
    """
    if dtype in (None, left.dtype) and (kernel := _kernel(left, right)):
        return kernel.grams(left, right)[:, 0]
    count, dim, wide = left.shape
    size = piece(dim, 256 if wide >= 64 else 128)
    if not size:  # a length without a fitting divisor
        return (left.double().mT @ right.double()).to(dtype or left.dtype)
    parts = torch.bmm(left.reshape(-1, size, wide).mT, right.reshape(-1, size, right.shape[2]))
    if size == dim:
        return parts.to(dtype or parts.dtype)
    return parts.view(count, dim // size, wide, -1).sum(1, dtype=dtype)


@cache
def piece(dim: int, limit: int) -> int:
    """The largest divisor of dim up to a limit, or 0 if that is small: then pieces would not pay."""
    if dim <= limit:
        return dim
    size = max(d for d in range(1, limit + 1) if dim % d == 0)
    return size if size >= 32 else 0


def times(x: Tensor, core: Tensor, out: Tensor | None = None) -> Tensor:
    """x core, [L, dim, r] and [L, r, r] -> [L, dim, r]."""
    if kernel := _kernel(x, x if out is None else out):
        return kernel.times_(torch.empty_like(x) if out is None else out, x, core)
    return torch.bmm(x, core, out=out)


def _kernel(*stacks: Tensor) -> ModuleType | None:
    """Kernels that take these stacks, where this GPU has them."""
    if stacks[0].device.type != "cuda" or not _triton():
        return None
    from trainer import manifold_kernel  # late: Triton is only where there is a GPU for it

    return manifold_kernel if manifold_kernel.fits(*stacks) else None


@cache
def _triton() -> bool:
    try:
        importlib.import_module("triton")
    except Exception:  # it is missing, or broken: torch's own products do
        return False
    return True


def riemannian_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """grad - X (grad^T X), all [L, dim, r]: the gradient in the canonical metric (Edelman et al. 1998,
    2.4), which StelLA hands to the optimizer (Li et al. 2510.01938)."""
    return riemannian_gradient_(x, grad.clone())


def riemannian_gradient_(x: Tensor, grad: Tensor) -> Tensor:
    """`riemannian_gradient` in place of grad."""
    with exact_arithmetic(x.device):
        if kernel := _kernel(x, grad):
            return kernel.times_(grad, x, gram(grad, x).neg(), add=True)
        return grad.baddbmm_(x, gram(grad, x), alpha=-1)


def tangent_projection(x: Tensor, delta: Tensor) -> Tensor:
    """delta - X sym(X^T delta), all [L, dim, r]: onto the tangent space at x, in the Euclidean metric."""
    with exact_arithmetic(x.device):
        return torch.baddbmm(delta, x, sym(gram(x, delta)), alpha=-1)


def polar_retraction(x: Tensor, delta: Tensor) -> Tensor:
    """The orthonormal factor of X + delta for a tangent delta, all [L, dim, r]; keeps x where that would fail.

    Through the r x r Gram matrix, which for a tangent step has eigenvalues in [1, 1 + |delta|^2].
    """
    return _retracted(x, delta, "polar")


def exponential_map(x: Tensor, delta: Tensor) -> Tensor:
    """The geodesic of the canonical metric from x along a tangent delta, all [L, dim, r] (Edelman et al. 1998, 2.4).

    With A = X^T delta and N = delta - X A the end is [X N] exp([[A, -N^T N], [I, 0]]) [I; 0]: no QR is needed.
    """
    return _retracted(x, delta, "exponential")


def qr_retraction(x: Tensor, delta: Tensor) -> Tensor:
    """Q of X + delta = QR with diag(R) > 0 for a tangent delta, all [L, dim, r]; keeps x where that would fail."""
    return _retracted(x, delta, "qr")


def _retracted(x: Tensor, delta: Tensor, retraction: str) -> Tensor:
    y = x.clone()
    (fine,) = advance_([y], [delta], torch.ones_like, retraction, project=False)
    return torch.where(fine, y, x)


def advance_(points: Stacks, updates: Stacks, step: Step, retraction: str, project: bool = True, measure: bool = True,
             skip: Tensor | None = None) -> list[Tensor]:
    """The whole way from X along D, in place of X; stacks [L, dim, r] of any L and dim and one r.

    D is taken times `step` of its norm, shortened to the trust radius, projected onto the tangent space at X (unless
    it lies there) and retracted: "polar", "exponential" or "qr". measure: whether X^T X - I is measured and corrected;
    else it is taken to be zero, which is true but for rounding, some 1e-8 a step. skip: a bool on the device; where
    it is true nothing moves. Returns where all was well, [L, 1, 1] each; elsewhere (X far off the manifold, D not
    finite) X stays as it is, as long as D is finite. All r x r work runs as one batch, and nothing waits for the
    device.
    """
    with exact_arithmetic(points[0].device):
        grams = side_by_side([partial(_grams, x, d) for x, d in zip(points, updates)])
        along, square = (torch.cat(stacks) for stacks in zip(*grams))  # L r r each
        errors = torch.cat(side_by_side([partial(gram_error, x) for x in points])) if measure else None
        norm = _diagonal(square).sum(-1, dtype=torch.float64).sqrt()[:, None, None]
        scale = torch.minimum(step(norm), TRUST_RADIUS / norm)
        change, fine = RETRACTIONS[retraction](errors, along, square, scale, project)
        change.masked_fill_(~fine if skip is None else fine <= skip, 0.0)
        rank, counts = along.shape[-1], [len(x) for x in points]
        side_by_side([partial(_change, x, d, part[:, :rank], part[:, rank:])
                      for x, d, part in zip(points, updates, change.split(counts))])
        return list(fine.split(counts))


def _grams(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    if kernel := _kernel(x, d):
        return kernel.grams(x, d, square=True).unbind(1)
    return gram(x, d), gram(d, d)


def _change(x: Tensor, d: Tensor, of_x: Tensor, of_d: Tensor) -> None:
    if kernel := _kernel(x, d):
        kernel.times_(x, x, of_x, d, of_d, add=True)
    else:
        x.add_((d @ of_d).baddbmm_(x, of_x))


def side_by_side(work: Sequence[Callable[[], Any]], streams: int | None = None) -> list[Any]:
    """Results of pieces of work on CUDA tensors, each on a stream of its own, or dealt out to so many `streams`; one
    after the other without a GPU.

    Stacks of one size rarely fill a GPU, and their kernels are short. Memory is safe: what a stream allocates, it
    takes again only after it has waited for whatever was asked before, here.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return [piece() for piece in work]
    here = torch.cuda.current_stream()
    chosen = _streams(min(len(work), streams or len(work)), here.device)
    for stream in chosen:
        stream.wait_stream(here)
    results = []
    try:
        for stream, piece in zip(cycle(chosen), work):
            with torch.cuda.stream(stream):
                results.append(piece())
    finally:  # when memory runs out, too: what is let go may still be at work, and a recording could not end
        for stream in chosen:
            here.wait_stream(stream)
    return results


@cache
def _streams(count: int, device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]


def gram_error(x: Tensor) -> Tensor:
    """X^T X - I, [L, dim, r] -> [L, r, r]: summed up in fp64, since it is small beside what is summed."""
    error = gram(x, x, torch.float64)
    _diagonal(error).sub_(1)
    return error.to(x.dtype)


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
        inner = gram(x.double(), x.double())
        _diagonal(inner).sub_(1)
        return inner.abs().amax()


# -- r x r work, [L, r, r]; every function below is free of host synchronisation --------------------------------------
#
# A step is written as a small change of the identity, so that fp32 is enough for fp32 factors: with [X sD]^T [X sD] =
# [[I + E, V], [V^T, N]] and S = sym(V), the projected end X + s D - X S has the Gram matrix I + F,
# F = E + N - (S Q + Q^T S), Q = E + V - (S + E S) / 2, where no number near 1 is left to cancel.
# The arguments are E (None for zero), X^T D, D^T D and s.


def _diagonal(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1)


def _near_identity(e: Tensor | None, along: Tensor, square: Tensor, scale: Tensor, project: bool,
                   normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Coefficients [(I - S)(I + W) - I; s (I + W)] of [X D], W = normalize(F), and where F is small enough."""
    rank, scale = along.shape[-1], scale.to(along.dtype)
    v, f = along * scale, square * (scale * scale)
    double = v + v.mT  # 2 S
    if project:
        q = v.sub_(double, alpha=0.25) if e is None else (
            v.add_(e).sub_(double, alpha=0.25).baddbmm_(e, double, alpha=-0.25))
        sq = double @ q  # 2 S Q
        f = f.sub_(sq, alpha=0.5).sub_(sq.mT, alpha=0.5)
    else:
        f = f.add_(double)
    f = f if e is None else f.add_(e)
    w = normalize(f)
    change = f.new_empty(len(f), 2 * rank, rank)
    of_x = change[:, :rank]
    if project:
        torch.sub(w, double, alpha=0.5, out=of_x)
        of_x.baddbmm_(double, w, alpha=-0.5)
    else:
        of_x.copy_(w)
    _diagonal(w).add_(1)
    torch.mul(w, scale, out=change[:, rank:])
    return change, torch.linalg.matrix_norm(f, keepdim=True) < DOMAIN  # false for NaN as well


def _polar(e: Tensor | None, along: Tensor, square: Tensor, scale: Tensor, project: bool) -> tuple[Tensor, Tensor]:
    return _near_identity(e, along, square, scale, project, _inverse_sqrt)


def _qr(e: Tensor | None, along: Tensor, square: Tensor, scale: Tensor, project: bool) -> tuple[Tensor, Tensor]:
    return _near_identity(e, along, square, scale, project, _inverse_cholesky)


def _inverse_sqrt(f: Tensor) -> Tensor:
    """(I + F)^(-1/2) - I by a polynomial in three products; in fp64 mended by Newton's method (Higham 2008, ch. 6)."""
    c1, c2, c3, c4, c5, c6 = INVERSE_ROOT
    f2 = f @ f
    f3 = f2 @ f
    low = torch.add(f, f2, alpha=c2 / c1).add_(f3, alpha=c3 / c1)
    high = torch.add(f, f2, alpha=c5 / c4).add_(f3, alpha=c6 / c4)
    w = low.baddbmm_(f3, high, beta=c1, alpha=c4)
    for _ in range(2 if f.dtype == torch.float64 else 0):
        once = (f + w).baddbmm_(f, w)  # (I + F)(I + W) - I
        error = (once + w).baddbmm_(w, once)  # (I + W)(I + F)(I + W) - I
        w = torch.baddbmm(w, w, error, alpha=-0.5).sub_(error, alpha=0.5)
    return w


def _inverse_cholesky(f: Tensor) -> Tensor:
    """R^-1 - I of I + F = R^T R, R upper triangular with positive diagonal, by Newton's method from the identity.

    With Z = I + U the estimate and E = Z^T (I + F) Z - I, the factor of I + E is I + P to first order, P + P^T = E and
    P upper triangular (Chang, Paige and Stewart 1996); Z (I - P + P^2) squares the error. Batched
    Cholesky on a GPU may wait for the device.
    """
    upper = torch.ones_like(f[0]).triu()
    _diagonal(upper).mul_(0.5)
    p = f * upper
    u = torch.baddbmm(p, p, p, beta=-1)
    for _ in range(4 if f.dtype == torch.float64 else 3):
        once = (f + u).baddbmm_(f, u)  # (I + F)(I + U) - I
        p = (once + u.mT).baddbmm_(u.mT, once).mul_(upper)
        change = torch.baddbmm(p, p, p, beta=-1)
        u = (u + change).baddbmm_(u, change)
    return u


def _exponential(e: Tensor | None, along: Tensor, square: Tensor, scale: Tensor,
                 project: bool) -> tuple[Tensor, Tensor]:
    """Coefficients of the way to the geodesic's end in terms of [X D], normalised as the polar factor; in fp64."""
    rank, v = along.shape[-1], along.double() * scale
    eye = torch.eye(rank, dtype=v.dtype, device=v.device).expand_as(v)
    zero = torch.zeros_like(eye)
    first = eye if e is None else e.double() + eye
    inner = torch.cat([torch.cat([first, v], -1), torch.cat([v.mT, square.double() * scale**2], -1)], -2)
    step = torch.cat([-sym(v) if project else zero, eye], dim=-2)  # [X sD] step = tangent
    dtype, along = along.dtype, inner[:, :rank] @ step  # A = X^T tangent
    normal = step - torch.cat([along, zero], dim=-2)  # [X sD] normal = N
    bend = -(normal.mT @ inner @ normal)
    turn = torch.cat([torch.cat([along, bend], dim=-1), torch.cat([eye, zero], dim=-1)], dim=-2)
    end = _matrix_exponential(turn)[:, :, :rank]  # L 2r r
    combine = torch.cat([end[:, :rank], zero], dim=-2) + normal @ end[:, rank:]
    f = sym(combine.mT @ inner @ combine) - eye
    combine = torch.baddbmm(combine, combine, _inverse_sqrt(f))
    combine[:, rank:] *= scale
    _diagonal(combine[:, :rank]).sub_(1)
    return combine.to(dtype), torch.linalg.matrix_norm(f, keepdim=True) < DOMAIN


def _matrix_exponential(a: Tensor, halvings: int = 3, order: int = 10) -> Tensor:
    """exp(a) by scaling and squaring with a fixed Taylor order (Higham 2008, ch. 10): torch.matrix_exp
    waits for the device."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    scaled, result = a / 2**halvings, eye
    for k in range(order, 0, -1):
        result = torch.baddbmm(eye, scaled, result, alpha=1 / k)
    for _ in range(halvings):
        result = result @ result
    return result


RETRACTIONS = {"polar": _polar, "qr": _qr, "exponential": _exponential}
