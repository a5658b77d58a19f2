"""Flux's blocks with selective checkpointing: what diffusers' blocks compute, with the cheap parts by way of `redo`.

Products and attention are called one by one here, since between them diffusers' blocks leave nothing to take hold of;
in the same order, in which an adapter's dropout draws.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Modulation,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from torch import Tensor, nn

from trainer.memory.redo import Selective, redo

Rotary = tuple[Tensor, Tensor]
Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate: b 1 d


class SelectiveFluxBlock(Selective, FluxTransformerBlock):
    def remade(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Rotary,
               joint_attention_kwargs: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
        image, words = sets(self.norm1, temb, 6), sets(self.norm1_context, temb, 6)
        normed = redo(partial(modulated, self.norm1.norm, image[0]), hidden_states)
        normed_words = redo(partial(modulated, self.norm1_context.norm, words[0]), encoder_hidden_states)
        from_words, found = joint_attention(self.attn, normed, normed_words, image_rotary_emb)
        found = self.attn.to_out[1](self.attn.to_out[0](found.contiguous()))
        from_words = self.attn.to_add_out(from_words.contiguous())
        hidden_states = onwards(hidden_states, found, image, self.norm2, self.ff)
        encoder_hidden_states = onwards(encoder_hidden_states, from_words, words, self.norm2_context, self.ff_context)
        return clipped(encoder_hidden_states), hidden_states


class SelectiveFluxSingleBlock(Selective, FluxSingleTransformerBlock):
    def remade(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Rotary,
               joint_attention_kwargs: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
        length, attn = encoder_hidden_states.shape[1], self.attn
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # b n d
        modulation = sets(self.norm, temb, 3)[0]
        normed = redo(partial(modulated, self.norm.norm, modulation), x)
        wide = self.proj_mlp(normed)
        found = attention(attn, attn.to_q(normed), attn.to_k(normed), attn.to_v(normed), image_rotary_emb)
        joined = redo(lambda found, wide: torch.cat([found, self.act_mlp(wide)], dim=2), found, wide)
        x = clipped(x + modulation[2] * self.proj_out(joined))
        return x[:, :length], x[:, length:]


class SelectiveFlux2Block(Selective, Flux2TransformerBlock):
    def remade(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb_mod_img: Tensor, temb_mod_txt: Tensor,
               image_rotary_emb: Rotary, joint_attention_kwargs: dict[str, Any] | None = None
               ) -> tuple[Tensor, Tensor]:
        image, words = Flux2Modulation.split(temb_mod_img, 2), Flux2Modulation.split(temb_mod_txt, 2)
        normed = redo(partial(modulated, self.norm1, image[0]), hidden_states)
        normed_words = redo(partial(modulated, self.norm1_context, words[0]), encoder_hidden_states)
        from_words, found = joint_attention(self.attn, normed, normed_words, image_rotary_emb)
        from_words, found = self.attn.to_add_out(from_words), self.attn.to_out[1](self.attn.to_out[0](found))
        hidden_states = onwards(hidden_states, found, image, self.norm2, self.ff)
        encoder_hidden_states = onwards(encoder_hidden_states, from_words, words, self.norm2_context, self.ff_context)
        return clipped(encoder_hidden_states), hidden_states


class SelectiveFlux2SingleBlock(Selective, Flux2SingleTransformerBlock):
    def remade(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, temb_mod: Tensor,
               image_rotary_emb: Rotary, joint_attention_kwargs: dict[str, Any] | None = None) -> Tensor:
        modulation, attn = Flux2Modulation.split(temb_mod, 1)[0], self.attn
        normed = redo(partial(modulated, self.norm, modulation), hidden_states)
        query, key, value, wide = attn.to_qkv_mlp_proj(normed).split(
            [attn.inner_dim] * 3 + [attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1)
        found = attention(attn, query, key, value, image_rotary_emb)
        joined = redo(lambda found, wide: torch.cat([found, attn.mlp_act_fn(wide)], dim=-1), found, wide)
        return clipped(hidden_states + modulation[2] * attn.to_out(joined))


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    FluxTransformerBlock: SelectiveFluxBlock, FluxSingleTransformerBlock: SelectiveFluxSingleBlock,
    Flux2TransformerBlock: SelectiveFlux2Block, Flux2SingleTransformerBlock: SelectiveFlux2SingleBlock}


# The pieces.


def sets(norm: nn.Module, temb: Tensor, count: int) -> tuple[Modulation, ...]:
    """The modulations that Flux.1's adaptive norm makes of the time's embedding: `count` / 3 of them."""
    parts = [part[:, None] for part in norm.linear(norm.silu(temb)).chunk(count, dim=1)]  # b 1 d
    return tuple(tuple(parts[start : start + 3]) for start in range(0, count, 3))


def modulated(norm: nn.Module, modulation: Modulation, x: Tensor) -> Tensor:
    shift, scale, _ = modulation
    return norm(x) * (1 + scale) + shift


def onwards(x: Tensor, found: Tensor, modulations: tuple[Modulation, ...], norm: nn.Module, feed_forward: nn.Module
            ) -> Tensor:
    """A stream from what attention found to the block's end."""
    x = x + modulations[0][2] * found
    return x + modulations[1][2] * feed_forward(redo(partial(modulated, norm, modulations[1]), x))


def attention(attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary) -> Tensor:
    """Of single blocks, b n d; queries and keys before norm and rotation."""
    return attend(redo(partial(rotated, attn.norm_q, rotary), by_head(attn, query)),
                  redo(partial(rotated, attn.norm_k, rotary), by_head(attn, key)), by_head(attn, value))


def joint_attention(attn: nn.Module, x: Tensor, words: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Of double blocks: what is found for words (b m d) and image (b n d), each before its last product."""
    of_image = [by_head(attn, product(x)) for product in (attn.to_q, attn.to_k, attn.to_v)]
    of_words = [by_head(attn, product(words)) for product in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
    query = redo(partial(joined_rotated, attn.norm_added_q, attn.norm_q, rotary), of_words[0], of_image[0])
    key = redo(partial(joined_rotated, attn.norm_added_k, attn.norm_k, rotary), of_words[1], of_image[1])
    value = torch.cat([of_words[2], of_image[2]], dim=1)
    return attend(query, key, value).split_with_sizes([words.shape[1], x.shape[1]], dim=1)


def by_head(attn: nn.Module, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, attn.head_dim))  # b n h d


def rotated(norm: nn.Module, rotary: Rotary, x: Tensor) -> Tensor:
    return apply_rotary_emb(norm(x), rotary, sequence_dim=1)


def joined_rotated(norm_words: nn.Module, norm: nn.Module, rotary: Rotary, words: Tensor, x: Tensor) -> Tensor:
    return apply_rotary_emb(torch.cat([norm_words(words), norm(x)], dim=1), rotary, sequence_dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return dispatch_attention_fn(query, key, value).flatten(2, 3).to(query.dtype)


def clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
