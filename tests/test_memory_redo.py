"""Activations that are made again: the gradients to the bit, less kept, each made once, nothing held on to."""

from __future__ import annotations

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.memory.redo import Remaking, redo
from trainer.memory.trace import Alive

WIDTH = 64
FIRST, LAST = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)


def gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def block(x: Tensor) -> Tensor:
    """Norm, product, gate, norm, product: the second norm's input has a recipe too, and views are saved as well."""
    normed = redo(lambda x: F.layer_norm(x, (WIDTH,)) * 3, x)
    hidden = redo(lambda x: F.layer_norm(x, (WIDTH,)), redo(gated, FIRST(normed)))
    return x + LAST(hidden) + (hidden.unflatten(-1, (8, 8)).mT @ hidden.unflatten(-1, (8, 8))).flatten(-2)


def gradients(x: Tensor, remaking: bool) -> tuple[list[Tensor], int]:
    """Of input and weights; and how many bytes are kept between the passes."""
    x = x.clone().requires_grad_()
    with Alive([x, *FIRST.parameters(), *LAST.parameters()]) as alive:
        if remaking:
            with Remaking():
                y = block(x)
        else:
            y = block(x)
        kept = alive.now
    return [y, *torch.autograd.grad(y.square().sum(), [x, *FIRST.parameters(), *LAST.parameters()])], kept


def test_gradients_are_the_same_to_the_bit_and_less_is_kept() -> None:
    x = torch.randn(256, WIDTH)
    (plain, kept), (redone, less) = gradients(x, False), gradients(x, True)
    assert all(map(torch.equal, plain, redone))
    assert less == 3 * x.nbytes  # of the product 2, of the answer 1
    assert kept > 7 * x.nbytes  # and of each norm and of the gate's two halves


def test_an_activation_is_made_once_for_all_who_saved_it() -> None:
    made = []

    def counted(x: Tensor) -> Tensor:
        made.append(torch.is_grad_enabled())
        return x.exp()

    x, weights = torch.randn(4, WIDTH, requires_grad=True), torch.randn(3, WIDTH, requires_grad=True)
    with Remaking():
        y = redo(counted, x)
        products = [(y * weight).sum() for weight in weights]
    torch.stack(products).sum().backward()
    assert made == [False, True]
    torch.testing.assert_close(x.grad, x.detach().exp() * weights.detach().sum(0))


def test_nothing_is_redone_where_nothing_would_be_kept() -> None:
    x = torch.randn(4, WIDTH)
    with Remaking():
        assert redo(torch.exp, x).grad_fn is None
        with torch.no_grad():
            assert redo(torch.exp, x.clone().requires_grad_()).grad_fn is None
    assert type(redo(torch.exp, x.requires_grad_()).grad_fn).__name__ == "ExpBackward0"


def test_what_was_made_is_let_go_with_the_block_and_its_inputs_with_the_backward_pass() -> None:
    x, weight = torch.randn(4, WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True)
    with Remaking():
        source = x * 2
        y = redo(torch.exp, source)
        total = (y * weight).sum()
    gone, inputs = weakref.ref(y.untyped_storage()), weakref.ref(source.untyped_storage())
    del y, source
    gc.collect()
    assert gone() is None and Remaking.now is None
    total.backward()
    gc.collect()
    assert inputs() is None
