"""Which layers are quantised, how much they weigh, and that loading holds one tensor at a time."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from tests.bench.host_memory import load_peak, make_shards
from trainer.errors import UserError
from trainer.families.tensors import fill
from trainer.quantize.linear import Nf4Linear, QuantizedLinear
from trainer.quantize.model import MODES, linears_in_blocks, quantised_linear, weight_bytes


@pytest.mark.parametrize("shape", [(24, 40), (3072, 12288), (7, 5), (1, 1), (257, 64)])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_by_shape_are_those_of_the_layer(mode, shape):
    layer = quantised_linear(torch.ones(shape), None, None, mode, torch.bfloat16)
    assert weight_bytes(shape, mode) == sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    assert weight_bytes(shape, "none") == 2 * shape[0] * shape[1]


def test_nf4_takes_little_more_than_four_bits():
    assert 8 * weight_bytes((3072, 3072), "nf4") / 3072**2 == pytest.approx(4.127, abs=1e-3)


class Model(nn.Module):
    """Names as diffusers and transformers give them."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.proj_out = nn.Linear(8, 16), nn.Linear(16, 8)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"time_emb_proj": nn.Linear(16, 16)})])
        for name in ("transformer_blocks", "single_transformer_blocks", "block", "layers"):
            block = nn.ModuleDict({"ff": nn.Linear(16, 16), "norm": nn.LayerNorm(16)})
            setattr(self, name, nn.ModuleList([block]))


def meta_model() -> Model:
    with torch.device("meta"):
        return Model()


def test_the_linears_of_repeated_blocks_are_quantised_and_nothing_else():
    names = ["transformer_blocks", "single_transformer_blocks", "block", "layers"]
    assert list(linears_in_blocks(Model())) == [f"{name}.0.ff" for name in names]
    weights = Model().state_dict()
    model = fill(meta_model(), weights, "cpu", torch.bfloat16, "x", "nf4")
    kinds = {path: type(module) for path, module in model.named_modules() if hasattr(module, "in_features")}
    assert {path for path, kind in kinds.items() if kind is Nf4Linear} == {f"{name}.0.ff" for name in names}
    assert model.proj_out.weight.dtype == model.layers[0]["norm"].weight.dtype == torch.bfloat16
    assert model.layers[0]["ff"].bias.dtype == torch.bfloat16
    assert torch.equal(model.layers[0]["ff"].bias, weights["layers.0.ff.bias"].bfloat16())
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_quantised_from_the_precision_of_the_file(mode):
    """Not from the model's own: rounding twice would move codes."""
    weights = Model().state_dict()
    model = fill(meta_model(), weights, "cpu", torch.bfloat16, "x", mode)
    expected = quantised_linear(weights["block.0.ff.weight"], None, None, mode, torch.bfloat16)
    assert torch.equal(model.block[0]["ff"].weight, expected.weight)


def test_a_quantised_model_does_not_read_its_file_again(tmp_path):
    codes = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
             for name, tensor in Model().state_dict().items()}
    model = fill(meta_model(), codes, "cpu", torch.float32, "x", "fp8")
    before = model.block[0]["ff"].weight
    codes["block.0.ff.weight"].zero_()
    assert torch.equal(model.block[0]["ff"].weight, before) and before.any()


def test_a_missing_or_wrong_weight_of_a_quantised_layer_is_told_as_of_any_other(tmp_path):
    weights = Model().state_dict()
    with pytest.raises(UserError, match="some.file: layers.0.ff.weight has the shape"):
        fill(meta_model(), weights | {"layers.0.ff.weight": torch.ones(2, 2)}, "cpu", torch.float32, "some.file", "nf4")
    del weights["block.0.ff.weight"]
    with pytest.raises(UserError, match="some.file lacks 1 of .* such as block.0.ff.weight"):
        fill(meta_model(), weights, "cpu", torch.float32, "some.file", "nf4")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's anonymous memory")
def test_loading_shards_never_holds_more_than_a_tensor_beside_the_model(tmp_path):
    """192 MB of bf16 in three shards become 96 MB of int8, 2 MB at a time."""
    make_shards(tmp_path, blocks=12, width=1024, shards=3)
    measured = load_peak(tmp_path, "int8", "cpu")
    assert measured["shard"] > 60e6 and measured["held"] > 90e6
    assert measured["peak"] - measured["held"] < 50e6 < measured["shard"]


def test_the_layers_keep_their_place_in_names_and_sizes():
    layer = quantised_linear(torch.ones(3, 64), None, torch.ones(3), "nf4", torch.float32)
    assert isinstance(layer, QuantizedLinear) and str(layer) == "Nf4Linear(in_features=64, out_features=3, bias=True)"
    assert list(layer.state_dict()) == ["bias"]
