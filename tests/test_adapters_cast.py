"""Stacks in another dtype, and their gradients."""

from __future__ import annotations

import torch

from trainer.adapters.cast import cast


def test_copies_and_gradients_are_those_of_single_casts_and_an_unused_stack_gets_zeros():
    stacks = {key: torch.randn(2, size, 3, requires_grad=True) for key, size in (("a", 4), ("b", 5), ("c", 6))}
    copies = cast(stacks, torch.bfloat16)
    assert list(copies) == list(stacks)
    for key in stacks:
        assert torch.equal(copies[key], stacks[key].to(torch.bfloat16))
    slices, grad = copies["a"].unbind(0), torch.randn(4, 3, dtype=torch.bfloat16)
    torch.autograd.backward([slices[1], copies["b"]], [grad, torch.ones_like(copies["b"])])
    assert torch.equal(stacks["a"].grad, torch.stack([torch.zeros(4, 3), grad.float()]))
    assert torch.equal(stacks["b"].grad, torch.ones(2, 5, 3))
    assert not stacks["c"].grad.any()


def test_what_has_the_dtype_is_not_copied():
    stacks = {"a": torch.randn(2, 4, 3)}
    assert cast(stacks, torch.float32)["a"] is stacks["a"]
