"""KID and the Fréchet distance of two small sets of features, with what is needed to read them honestly."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.metrics.features import Extractor

# torchmetrics' FrechetInceptionDistance and KernelInceptionDistance give the same numbers (the tests hold it)
# but take eigenvalues of d×d matrices (seconds for d = 2048), take sets of one size, and offer neither an interval
# nor a floor; hence the forms below, which for n pictures work on n×n.
SMALLEST = 3  # a jackknife leaves one out, and the variance of what is left needs two
FLOOR_SPLITS = 8
Z_95 = 1.96


def frechet(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features x [n, d] and y [m, d] (Heusel et al. 2017, equation
    6).

    tr((Σ₁Σ₂)^½) is the nuclear norm of A Bᵀ/√((n−1)(m−1)) for the centred sets A and B, in fp64. Biased
    upwards, and more so the fewer pictures: compare at equal counts only, and with `frechet_floor`.
    """
    x, y = x.double(), y.double()
    a, b = _centred(x), _centred(y)
    cross = torch.linalg.svdvals(_triangle(a) @ _triangle(b).T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2.0 * cross)


def frechet_floor(reference: Tensor, n: int, seed: int) -> float:
    """What `frechet` gives between pictures of the reference itself: the mean over random disjoint parts.

    Each part has n pictures, or half of the reference [m, d] when n is more. A generated set that is as good
    as the reference ends near this number, not near 0 (a little below it when it is compared with the whole
    reference).
    """
    n = min(n, len(reference) // 2)
    if n < 2:
        raise UserError(f"the distance's floor needs at least 4 held-out pictures, not {len(reference)}.")
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(FLOOR_SPLITS):
        order = torch.randperm(len(reference), generator=generator)
        total += frechet(reference[order[:n]], reference[order[n:2 * n]])
    return total / FLOOR_SPLITS


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD² x [n, d] y [m, d], kernel (a·b/d + 1)³ (Bińkowski et al., 2018)."""
    return kid_interval(x, y)[0]


def kid_interval(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(KID, low, high): KID of x [n, d] and y [m, d] with its 95 % interval by the two-sample jackknife.

    Variance: (n−1)/n Σ(θ₋ᵢ − mean)² for leaving out each of x, plus the same for y. A bootstrap would be
    wrong: it draws pictures twice, which an unbiased estimate takes for similarity. Raises `UserError` under
    3 pictures a set.
    """
    n, m = len(x), len(y)
    if min(n, m) < SMALLEST:
        raise UserError(f"KID needs at least {SMALLEST} pictures a set, not {n} and {m}.")
    x, y = x.double(), y.double()
    xy = _kernel(x, y)  # n m
    within_x, within_y = (_kernel(z, z).fill_diagonal_(0.0).sum(1) for z in (x, y))  # n, m

    def value(sum_x: Tensor, sum_y: Tensor, sum_xy: Tensor, n: int, m: int) -> Tensor:
        return sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2.0 * sum_xy / (n * m)

    sum_x, sum_y, sum_xy = within_x.sum(), within_y.sum(), xy.sum()
    estimate = float(value(sum_x, sum_y, sum_xy, n, m))
    without_x = value(sum_x - 2.0 * within_x, sum_y, sum_xy - xy.sum(1), n - 1, m)  # n
    without_y = value(sum_x, sum_y - 2.0 * within_y, sum_xy - xy.sum(0), n, m - 1)  # m
    variance = sum((len(t) - 1) / len(t) * (t - t.mean()).square().sum() for t in (without_x, without_y))
    half = Z_95 * float(variance) ** 0.5
    return estimate, estimate - half, estimate + half


def nearest_cosine(generated: Tensor, training: Tensor) -> Tensor:
    """Cosine of each generated picture [n, d] to the likest training picture [m, d]: [n]; 1 is a copy."""
    a, b = (torch.nn.functional.normalize(z.double(), dim=1) for z in (generated, training))
    return (a @ b.T).amax(1)


def measure(reference: Tensor, generated: Tensor, training: Tensor | None = None, *,
            extractor: Extractor) -> dict[str, float | int | str | None]:
    """The fields of a `distance` event from features: held-out [n, d], generated [m, d], trained on [k, d].

    KID and its interval are times 10³, as papers print it. `nn_cosine` is that of the likeliest copy (≥ 0.97:
    look at it), None without `training`. Raises `UserError` when there are too few pictures.
    """
    estimate, low, high = kid_interval(reference, generated)
    return {
        "extractor": extractor.name, "resize": extractor.resize,
        "kid": 1e3 * estimate, "kid_low": 1e3 * low, "kid_high": 1e3 * high,
        "fd": frechet(reference, generated),
        "fd_floor": frechet_floor(reference, len(generated), seed=0) if len(reference) >= 4 else None,
        "n_ref": len(reference), "n_gen": len(generated),
        "nn_cosine": None if training is None else float(nearest_cosine(generated, training).max()),
    }


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _centred(x: Tensor) -> Tensor:
    """Rows whose outer products sum to the covariance."""
    return (x - x.mean(0)) / (len(x) - 1) ** 0.5


def _triangle(a: Tensor) -> Tensor:
    """A itself for few pictures, for many the d×d triangle R with AᵀA = RᵀR: the nuclear norm is the same."""
    return a if a.shape[0] <= a.shape[1] else torch.linalg.qr(a, mode="r").R
