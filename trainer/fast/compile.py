"""Compiles the blocks that a denoiser repeats: one function for each class of them, not one for each block."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from trainer.memory.blocks import repeated_blocks

VARIANTS = 256  # of a class: each size of layers and each shape of batch is compiled for itself


class CompiledBlock:
    """Mixed in before a block's own class: passes that record gradients run compiled, pictures are drawn without.

    Pictures come in other shapes, seldom, and without gradients: compiling for them would take longer than it saves.
    """

    plain_kind: type[nn.Module]  # the class the block had

    def forward(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - what the block takes and gives
        if torch.is_grad_enabled():
            return compiled_forward(self.plain_kind)(self, *inputs, **named)
        return super().forward(*inputs, **named)


@cache
def compiled_forward(kind: type[nn.Module]) -> Any:  # noqa: ANN401
    """The compiled `forward` of a class."""
    return torch.compile(kind.forward, dynamic=False)


@cache
def compiled_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block's class that runs compiled."""
    return type(f"Compiled{kind.__name__}", (CompiledBlock, kind), {"plain_kind": kind})


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """What is compiled: transformer blocks, and a UNet's residual blocks."""
    return repeated_blocks(denoiser) + [module for module in denoiser.modules() if isinstance(module, ResnetBlock2D)]


def install(denoiser: nn.Module) -> None:
    """Let the blocks run compiled; each variant is compiled when it is first met."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in blocks_of(denoiser):
        if not isinstance(block, CompiledBlock):
            block.__class__ = compiled_class(type(block))


def is_installed(denoiser: nn.Module) -> bool:
    """Whether blocks run compiled."""
    return any(isinstance(block, CompiledBlock) for block in blocks_of(denoiser))


def remove(denoiser: nn.Module) -> bool:
    """Give the blocks their own classes back; says whether any was compiled."""
    compiled = [block for block in blocks_of(denoiser) if isinstance(block, CompiledBlock)]
    for block in compiled:
        block.__class__ = block.plain_kind
    return bool(compiled)


def compiler_missing() -> str | None:
    """What the compiler lacks on this computer, in words; None where it is whole."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which torch compiles with, is not installed"
    return None
