"""The steps of StelLA and Stiefel-LoRA as published: one parameter a factor, each copied and decomposed apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def parameters_of(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[nn.Parameter]:
    """Orthonormal [dim, r] parameters with gradients, one a factor."""
    parameters = []
    for dim, rank in shapes:
        parameter = nn.Parameter(torch.linalg.qr(torch.randn(dim, rank, device=device))[0])
        parameter.grad = torch.zeros_like(parameter)
        parameters.append(parameter)
    return parameters


def stella_step(factors: list[nn.Parameter], free: list[nn.Parameter], lr: float) -> Callable[[], None]:
    """Buckets of equal shape, a copy of every parameter in and out, the polar factor by a batched SVD."""
    optimizer = torch.optim.AdamW([{"params": factors, "weight_decay": 0.0}, {"params": free}], lr=lr)
    buckets: dict[torch.Size, list[nn.Parameter]] = {}
    for factor in factors:
        buckets.setdefault(factor.shape, []).append(factor)
    driver = {"driver": "gesvda"} if factors[0].is_cuda else {}

    @torch.no_grad()
    def step() -> None:
        snapshots = {}
        for shape, members in buckets.items():
            x, grad = torch.stack(list(members)), torch.stack([member.grad for member in members])
            snapshots[shape] = x
            for member, piece in zip(members, grad - x @ (grad.mT @ x)):
                member.grad.copy_(piece)
        optimizer.step()
        for shape, members in buckets.items():
            x, update = snapshots[shape], torch.stack(list(members)) - snapshots[shape]
            inner = x.mT @ update
            left, _, right = torch.linalg.svd(x + update - x @ (inner + inner.mT) / 2, full_matrices=False, **driver)
            for member, piece in zip(members, left @ right):
                member.copy_(piece)
        optimizer.zero_grad(set_to_none=False)

    return step


def stiefel_step(ups: list[nn.Parameter], downs: list[nn.Parameter], lr: float) -> Callable[[], None]:
    """A loop over parameters with one QR a matrix."""
    momenta: dict[nn.Parameter, Tensor] = {parameter: torch.zeros_like(parameter) for parameter in (*ups, *downs)}

    @torch.no_grad()
    def step() -> None:
        for down in downs:
            momentum = momenta[down].mul_(0.95).add_(down.grad)
            down.sub_(0.2 * lr * momentum.sign())
        for up in ups:
            momentum = momenta[up].mul_(0.95).add_(up.grad)
            inner = up.t() @ momentum
            tangent = momentum - up @ (inner + inner.t()) / 2
            update = tangent * (0.2 * lr * up.numel() ** 0.5) / tangent.norm().clamp_min(1e-12)
            q, r = torch.linalg.qr(up - update)
            up.copy_(q * r.diagonal().sign())
        for parameter in (*ups, *downs):
            parameter.grad.zero_()

    return step
