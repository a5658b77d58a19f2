"""What an adapter is attached to: one frozen layer, its matrix sizes, and the checks that a rank fits it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from trainer.errors import UserError


@dataclass(frozen=True)
class Target:
    """One frozen layer. The module is held, not its weight, so that quantised and offloaded layers work alike."""

    name: str  # dotted path with the model, such as "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    module: nn.Module  # Linear or Conv2d, or a quantised layer with the same attributes
    group: str  # for plots, such as "mid.attn1"
    parts: tuple[nn.Module, ...] = ()  # linears that share one input, whose stacked rows are the matrix; else empty

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The layers whose rows, one below the other, the adapter changes."""
        return self.parts or (self.module,)

    def part(self, module: nn.Module) -> Target:
        """One of the stacked layers by itself."""
        return Target(self.name, module, self.group)

    @property
    def convolution(self) -> bool:
        return hasattr(self.module, "kernel_size")

    @property
    def rows(self) -> int:
        """m: output features or channels."""
        return self.module.out_channels if self.convolution else sum(part.out_features for part in self.modules)

    @property
    def inputs(self) -> int:
        """Input features or channels: the length of a DoRA magnitude."""
        return self.module.in_channels if self.convolution else self.module.in_features

    @property
    def columns(self) -> int:
        """n: input features; for a convolution channels times kernel area, as in [m, c*k*k]."""
        area = self.module.kernel_size[0] * self.module.kernel_size[1] if self.convolution else 1
        return self.inputs * area


def matching(targets: Sequence[Target], pattern: str) -> list[Target]:
    """The targets in whose names the regular expression is found; all for an empty one."""
    return [target for target in targets if re.search(pattern, target.name)]


def part_rows(targets: Sequence[Target]) -> dict[str, list[int]]:
    """Rows of each target's stacked parts, by its name; none for those that are one layer."""
    return {target.name: [part.out_features for part in target.parts] for target in targets if target.parts}


def check_targets(targets: Sequence[Target], rank: int) -> None:
    """Raise UserError unless every layer takes an adapter of this rank."""
    if not targets:
        raise UserError("no layer was chosen for the adapter: adapter.targets and adapter.target_pattern match "
                        "nothing in this model")
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise ValueError("two adapter targets have the same name")
    for target in targets:
        smaller = min(target.rows, target.columns)
        if rank >= smaller:
            raise UserError(
                f"adapter.rank = {rank} is too high for {target.name}, a {target.rows} x {target.columns} matrix: "
                f"choose at most {smaller - 1}, or leave that layer out with adapter.targets"
            )
        module = target.module
        if target.convolution and (module.groups != 1 or module.padding_mode != "zeros" or module.padding == "same"):
            raise UserError(
                f"{target.name} is a convolution with groups or a padding that the adapter does not follow: "
                f"leave it out with adapter.targets"
            )
