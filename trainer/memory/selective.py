"""Selective checkpointing: blocks keep what large products and attention made, and redo what lies between.

Norms, modulations, activation functions, rotations and joined tensors take half of what a step holds and next to none
of its arithmetic. Blocks take another class for it, as adapters and compiled blocks do.
"""

from __future__ import annotations

from types import ModuleType

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
from torch import Tensor, nn

from trainer.fast.group_norm import ChannelsLastNorm
from trainer.memory import selective_flux
from trainer.memory.redo import Selective, redo


class RemadeLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return redo(super().forward, x)


class RemadeGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return redo(super().forward, x)


class RemadeChannelsLastNorm(ChannelsLastNorm):
    def forward(self, x: Tensor) -> Tensor:
        return redo(super().forward, x)


class RemadeSiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return redo(super().forward, x)


class RemadeSwiGLU(Flux2SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return redo(super().forward, x)


class RemadeGELU(GELU):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return redo(self.gelu, self.proj(hidden_states))


class RemadeGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return redo(self.gated, self.proj(hidden_states))

    def gated(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return x * self.gelu(gate)


class SelectiveBlock(Selective, BasicTransformerBlock):
    """Its norms and activation functions redo."""


class SelectiveResnet(Selective, ResnetBlock2D):
    """The same; a frozen convolution saves its input, which is redone too."""


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: RemadeLayerNorm, nn.GroupNorm: RemadeGroupNorm, ChannelsLastNorm: RemadeChannelsLastNorm,
    nn.SiLU: RemadeSiLU, GELU: RemadeGELU, GEGLU: RemadeGEGLU, Flux2SwiGLU: RemadeSwiGLU,
    BasicTransformerBlock: SelectiveBlock, ResnetBlock2D: SelectiveResnet} | selective_flux.KINDS
PLAIN = {selective: plain for plain, selective in KINDS.items()}


def checkpoint_blocks(family: ModuleType, denoiser: nn.Module, level: str) -> None:
    """Keep everything for the backward pass ("none"), redo what is cheap ("selective"), or blocks as a whole ("full").
    """
    family.set_gradient_checkpointing(denoiser, level == "full")
    (install if level == "selective" else remove)(denoiser)


def install(denoiser: nn.Module) -> None:
    """Let blocks redo what is cheap; it may be installed already."""
    _swap(denoiser, KINDS)


def remove(denoiser: nn.Module) -> None:
    """Give modules their own classes back."""
    _swap(denoiser, PLAIN)


def _swap(denoiser: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in denoiser.modules():
        if (kind := kinds.get(type(module))) is not None:
            module.__class__ = kind
