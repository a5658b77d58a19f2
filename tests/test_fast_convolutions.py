"""Channels last in convolutions: the same numbers within rounding, and everything that reads weights is unaffected."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_memory_selective import gradients, tiny
from trainer.adapters.layer import base_matrix
from trainer.fast.convolutions import OrderedTransformer, lay_out
from trainer.fast.group_norm import ChannelsLastNorm
from trainer.memory import selective
from trainer.memory.plan import Plan
from trainer.session import hold

WAYS = [("sd15:1:none:int8", "stella", ()),
        ("sdxl:1", "lora", ('adapter.targets=["convolution"]', "adapter.dora=true"))]


def layouts(model: nn.Module) -> set[bool]:
    """Whether weights of convolutions that could lie in either order have their channels last."""
    return {weight.is_contiguous(memory_format=torch.channels_last) for weight in model.state_dict().values()
            if weight.ndim == 4 and not (weight.is_contiguous() and weight.is_contiguous(
                memory_format=torch.channels_last))}


def close(one: list[Tensor], other: list[Tensor]) -> None:
    for first, second in zip(one, other):
        assert (first - second).norm() <= 1e-6 * first.norm()  # the loss itself is in fp32


@pytest.mark.parametrize(("case", "method", "changes"), WAYS, ids=lambda part: str(part))
def test_a_step_has_the_same_numbers(case: str, method: str, changes: tuple[str, ...]) -> None:
    session, size = tiny(case, method, changes, torch.float64)
    targets = session.adapter.layout.targets
    plain, matrices = gradients(session, size), [base_matrix(target) for target in targets]
    assert layouts(session.denoiser) == {False}
    lay_out(session.denoiser, torch.channels_last)
    assert layouts(session.denoiser) == {True}
    last = gradients(session, size)
    close(plain, last)
    selective.install(session.denoiser)
    assert all(map(torch.equal, last, gradients(session, size)))
    assert all(map(torch.equal, matrices, map(base_matrix, targets)))  # of which starts and DoRA's norms are made
    lay_out(session.denoiser, torch.contiguous_format)
    assert layouts(session.denoiser) == {False} and all(map(torch.equal, plain, gradients(session, size)))


@pytest.mark.parametrize("case", ["sd15:2", "sdxl:1"])
def test_images_stay_in_their_order_through_attention(case: str) -> None:
    session, size = tiny(case, "lora", ())
    lay_out(session.denoiser)
    stacks = [module for module in session.denoiser.modules() if isinstance(module, OrderedTransformer)]
    orders: list[tuple[bool, bool]] = []
    for stack in stacks:
        stack.register_forward_hook(lambda module, given, found: orders.append(
            (is_last(given[0]), is_last(found[0]))))
    gradients(session, size)
    assert orders == [(True, True)] * len(stacks) and len(stacks) > 5


def test_on_a_gpu_layers_are_the_fast_ones(monkeypatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)  # it comes back
    session, _ = tiny("sd15:1", "lora", ())
    for device, fast in (("cpu", False), ("cuda", True), ("cuda", True)):
        assert hold(session.family, session.denoiser, Plan(), torch.device(device)) is None
        assert layouts(session.denoiser) == {fast}
        assert any(isinstance(module, ChannelsLastNorm) for module in session.denoiser.modules()) == fast


def is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
