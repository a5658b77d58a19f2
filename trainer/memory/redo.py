"""Activations that are made again in the backward pass, from what is kept anyway, in place of being kept themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

Function = Callable[..., Tensor]  # of tensors alone; whatever else it needs is frozen


class Recipe:
    """How to make an activation again: a cheap function, and its inputs, which may have recipes themselves."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], remaking: Remaking) -> None:
        self.function = function
        self.kept = [(remaking.pack(tensor), tensor.requires_grad) for tensor in inputs]
        self.leaves: list[Tensor] = []
        self.made: Tensor | None = None

    def again(self) -> Tensor:
        """The activation with its graph back to the inputs; made once for all who need it, which is exact."""
        if self.made is None:
            self.leaves = [unpack(packed).detach().requires_grad_(wanted) for packed, wanted in self.kept]
            with torch.enable_grad():
                self.made = self.function(*self.leaves)
        return self.made

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Of each input; the last that is asked of a recipe, since who takes an activation is differentiated first."""
        made = self.again()
        found = iter(torch.autograd.grad(made, [leaf for leaf in self.leaves if leaf.requires_grad], grad))
        wanted = [leaf.requires_grad for leaf in self.leaves]
        self.made, self.leaves, self.kept = None, [], []
        return [next(found) if one else None for one in wanted]


class Redone(torch.autograd.Function):
    """Runs a recipe's function and keeps nothing of what it holds on the way."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe = recipe
        return recipe.function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recipe, ctx.recipe = ctx.recipe, None
        return None, *recipe.gradients(grad)


class Remaking(saved_tensors_hooks):
    """While a block runs in it, what operations save of activations made by `redo` is kept as a recipe.

    Operations are told apart from the tensors that they save by storage, so views are known too. A mode that sees
    each operation would do without `redo`, but costs the host more than the operations take on a GPU.
    """

    now: ClassVar[Remaking | None] = None

    def __init__(self) -> None:
        super().__init__(self.pack, unpack)
        self.recipes: dict[int, tuple[Tensor, Recipe]] = {}  # by storage; held, lest another take its place
        self.before: Remaking | None = None

    def __enter__(self) -> None:
        self.before, Remaking.now = Remaking.now, self
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Remaking.now = self.before
        self.recipes.clear()  # saved tensors hold the hooks, and with them this

    def pack(self, tensor: Tensor) -> Any:  # noqa: ANN401 - a tensor, or what `unpack` makes one of
        """What is kept of a tensor that an operation saves."""
        found = self.recipes.get(tensor.untyped_storage()._cdata)
        return tensor if found is None else (found[1], tensor.size(), tensor.stride(), tensor.storage_offset())


def unpack(packed: Any) -> Tensor:  # noqa: ANN401
    """The tensor that `Remaking.pack` was given."""
    if isinstance(packed, Tensor):
        return packed
    recipe, size, stride, offset = packed
    return recipe.again().detach().as_strided(size, stride, offset)


def redo(function: Function, *inputs: Tensor) -> Tensor:
    """function(*inputs), a fresh tensor; inside of `Remaking` neither it nor what lies between is kept.

    The same operations on the same inputs make it again, so gradients are the same to the bit. The function must
    draw nothing at random and change nothing in place.
    """
    remaking = Remaking.now
    if remaking is None or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return function(*inputs)
    recipe = Recipe(function, inputs, remaking)
    made = Redone.apply(recipe, *inputs)
    remaking.recipes[made.untyped_storage()._cdata] = made, recipe
    return made


class Selective:
    """Mixed in before a block's own class: passes that record gradients run in `Remaking`.

    Compiled blocks run as they are, since the compiler itself redoes what is cheap.
    """

    def forward(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - what the block takes and gives
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(*inputs, **named)
        with Remaking():
            return self.remade(*inputs, **named)

    def remade(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401
        """The block's forward by way of `redo`; here its parts see to that."""
        return super().forward(*inputs, **named)
