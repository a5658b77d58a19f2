"""OpenCLIP's names of a text encoder, as single SDXL files keep its second one, turned to transformers'."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_OUTER = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_INNER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors by transformers' names; q, k and v, which OpenCLIP keeps as one, are views of it."""
    found = {}
    for name, tensor in tensors.items():
        if name in _OUTER:
            found[_OUTER[name]] = tensor
        elif name == "text_projection":
            found["text_projection.weight"] = tensor.t()
        elif name.startswith("transformer.resblocks."):
            _, _, number, rest = name.split(".", 3)
            found |= _of_layer(f"text_model.encoder.layers.{number}", rest, tensor)
    return found


def _of_layer(layer: str, rest: str, tensor: Tensor) -> dict[str, Tensor]:
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {f"{layer}.self_attn.{part}_proj.{kind}": piece for part, piece in zip("qkv", tensor.chunk(3))}
    module, kind = rest.rsplit(".", 1)
    return {f"{layer}.{_INNER[module]}.{kind}": tensor}
