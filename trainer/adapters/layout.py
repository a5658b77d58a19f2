"""Which layer sits where in which stack: layers of equal size share one stacked tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.adapters.target import Target

Place = tuple[str, int]  # key of a stack, position in it


def _grouped(sizes: Sequence[int]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(size, []).append(number)
    return dict(sorted(groups.items()))


@dataclass(frozen=True)
class Layout:
    """Stacks of the forward pair: `up.<m>` [L, m, r] and `down.<n>` [L, n, r] (down is stored transposed).

    ups, downs, inputs: size -> numbers of the layers in that stack, in order.
    """

    targets: tuple[Target, ...]
    rank: int
    ups: dict[int, list[int]] = field(init=False)
    downs: dict[int, list[int]] = field(init=False)
    inputs: dict[int, list[int]] = field(init=False)  # layers by magnitude length (channels of a convolution)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ups", _grouped([target.rows for target in self.targets]))
        object.__setattr__(self, "downs", _grouped([target.columns for target in self.targets]))
        object.__setattr__(self, "inputs", _grouped([target.inputs for target in self.targets]))

    def move(self, targets: Sequence[Target]) -> None:
        """Stand for the same layers of a model that was loaded again."""
        if [target.name for target in targets] != [target.name for target in self.targets]:
            raise ValueError("these are other layers")
        object.__setattr__(self, "targets", tuple(targets))

    def pair_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {f"up.{m}": (len(layers), m, self.rank) for m, layers in self.ups.items()}
        return shapes | {f"down.{n}": (len(layers), n, self.rank) for n, layers in self.downs.items()}

    def magnitude_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"magnitude.{size}": (len(layers), size) for size, layers in self.inputs.items()}

    def members(self, key: str) -> list[int]:
        """Numbers of the layers in the stack `up.<m>`, `down.<n>` or `magnitude.<size>`."""
        kind, size = key.split(".")
        return {"up": self.ups, "down": self.downs, "magnitude": self.inputs}[kind][int(size)]

    def by_layer(self, stacks: Mapping[str, Tensor], kind: str) -> list[Tensor]:
        """Slices of all stacks of a kind ("up", "down", "magnitude"), in layer order; differentiable as one stack."""
        slices: list[Tensor | None] = [None] * len(self.targets)
        for key, stack in stacks.items():
            if key.startswith(kind + "."):
                for number, piece in zip(self.members(key), stack.unbind(0)):
                    slices[number] = piece
        return slices

    def order(self, kind: str, device: torch.device) -> Tensor:
        """For the stacks of a kind laid one after another: which row holds layer i."""
        groups = {"up": self.ups, "down": self.downs}[kind]
        flat = [number for layers in groups.values() for number in layers]
        return torch.tensor(flat, device=device).argsort()

    def slot(self, stacks: Mapping[str, Tensor], kind: str, number: int) -> Tensor:
        """The slice of one layer, for set-up and export; the forward pass goes through `by_layer`."""
        size = self.targets[number].rows if kind == "up" else self.targets[number].columns
        key = f"{kind}.{size}"
        return stacks[key][self.members(key).index(number)]
