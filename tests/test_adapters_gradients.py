"""Gradients of whole adapters against autograd through the matrices written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from tests.tiny import METHODS, adapted, batch
from trainer.adapters import Adapter


def whole_weights(adapter: Adapter, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + up down of every layer, with DoRA's magnitude over the norm of each input column, the norm a constant."""
    pair, layout, weights = adapter.method.factors(leaves), adapter.layout, {}
    if "core" in leaves:
        cores = adapter.method.cores(leaves)
        pair |= {key: pair[key] @ (core.diag_embed() if core.ndim == 2 else core) for key, core in cores.items()}
    if adapter.frozen is not None:
        pair = {key: torch.cat([stack, adapter.frozen[key]], dim=-1) for key, stack in pair.items()}
    for number, target in enumerate(layout.targets):
        base = target.module.weight.detach()
        change = layout.slot(pair, "up", number) @ layout.slot(pair, "down", number).t()
        weight = (base.flatten(1) + change).unflatten(1, (target.inputs, -1))  # m n kernel
        if adapter.magnitude is not None:
            key = f"magnitude.{target.inputs}"
            magnitude = leaves[key][layout.members(key).index(number)]
            weight = weight * (magnitude / weight.detach().square().sum((0, 2)).sqrt())[:, None]
        weights[target.name.removeprefix("net.") + ".weight"] = weight.reshape(base.shape)
    return weights


WAYS = [*[(method, {}) for method in METHODS], ("lora", {"init": "pissa"}), ("stella", {"init": "pseudo-zero"}),
        ("stella", {"diagonal_s": True}), ("trilora", {"diagonal_s": True})]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method, options", WAYS)
def test_gradients_are_those_of_autograd_through_the_whole_matrices(method, options, dora):
    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.integers(1, 6), st.integers(0, 1000))
    def check(rank: int, seed: int) -> None:
        net, adapter = adapted(method, torch.float64, dora=dora, rank=rank, seed=seed, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for leaf in adapter.parameters():  # off the start, where some gradients are zero
                leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype))
        adapter.refresh("raw", torch.float64)
        loss = net(batch(seed, torch.float64)).square().mean()
        loss.backward()
        leaves = {key: leaf.detach().clone().requires_grad_() for key, leaf in adapter.leaves.items()}
        weights = whole_weights(adapter, leaves)
        adapter.remove()
        expected = functional_call(net, weights, batch(seed, torch.float64)).square().mean()
        assert (loss - expected).abs() <= 1e-12
        for key, grad in zip(leaves, torch.autograd.grad(expected, list(leaves.values()))):
            assert (adapter.leaves[key].grad - grad).abs().max() <= 1e-12, key

    check()
