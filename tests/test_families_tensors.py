"""Safetensors headers: damaged files are told in words; weights are checked, moved and told apart."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainer.errors import UserError
from trainer.families.tensors import Part, fill, fingerprint, mapped_tensors, read_header, without_prefix

HEADER = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'


def part(file):
    return Part(file, {"size": 1}, read_header(file).tensors, "diffusers")


def test_a_header_says_names_shapes_places_and_metadata(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"x.a": torch.ones(2, 3), "y": torch.zeros(4).half()}, file, {"key": "value"})
    header = read_header(file)
    assert header.metadata == {"key": "value"}
    assert header.tensors["x.a"].shape == (2, 3) and header.tensors["y"].dtype == "F16"
    assert header.tensors["x.a"].count == 6
    assert max(info.end for info in header.tensors.values()) == file.stat().st_size
    assert list(without_prefix(header.tensors, "x.")) == ["a"]
    assert torch.equal(mapped_tensors(part(file))["x.a"], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.ckpt", b"\x80\x02}", "is a pickle, which can run any program"),
        ("model.pt", b"PK\x03\x04", "is a pickle"),
        ("zipped.safetensors", b"PK\x03\x04" + bytes(100), "but a pickle under another name"),
        ("pickled.safetensors", b"\x80\x02}q\x00" + b"x" * 100, "but a pickle under another name"),
        ("empty.safetensors", b"", "but empty: download it again"),
        ("short.safetensors", b"abc", "is not a safetensors file. Download it again"),
        ("page.safetensors", b"<!DOCTYPE html><html></html>", "but a web page"),
        ("quantised.gguf", b"GGUF\x03\x00\x00\x00" + bytes(50), "but a GGUF, quantised for drawing"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        ("cut.safetensors", len(HEADER).to_bytes(8, "little") + HEADER[:20], "is cut short: it has 28 of 69 bytes"),
        ("data.safetensors", len(HEADER).to_bytes(8, "little") + HEADER, "is cut short: it has 69 of 73 bytes"),
        ("text.safetensors", (9).to_bytes(8, "little") + b"{no json}", "its header cannot be read"),
        ("odd.safetensors", (10).to_bytes(8, "little") + b'{"a": [1]}', "tensor 'a' lacks its type, shape or place"),
        ("list.safetensors", (6).to_bytes(8, "little") + b'{"a":[', "its header cannot be read"),
        ("deep.safetensors", (90005).to_bytes(8, "little") + b'{"a":' + b"[" * 90000, "its header cannot be read"),
    ],
)
def test_a_damaged_file_is_told_in_words(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_header(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_offsets": [4, 0]}, r"has the impossible place \[4, 0\]"),
        ({"data_offsets": [-4, 0]}, r"has the impossible place \[-4, 0\]"),
        ({"data_offsets": [0]}, r"has the impossible place \[0\]"),
        ({"data_offsets": ["0", "4"]}, "has the impossible place"),
        ({"data_offsets": 4}, "has the impossible place 4"),
        ({"shape": [2]}, r"of shape \[2\] has 4 bytes instead of 8"),
        ({"shape": [-1]}, r"has the impossible shape \[-1\]"),
        ({"shape": [10**30]}, "has the impossible shape"),
        ({"shape": [1.0]}, "has the impossible shape"),
        ({"shape": None}, "has the impossible shape"),
        ({"dtype": "F16"}, "has 4 bytes instead of 2"),
        ({"dtype": "Q4"}, "has the unknown type 'Q4'"),
        ({"dtype": ["F32"]}, "has the unknown type"),
    ],
)
def test_an_entry_that_does_not_agree_with_itself_is_told(tmp_path, changes, message):
    text = json.dumps({"a": json.loads(HEADER)["a"] | changes}).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(UserError, match=f"odd.safetensors is damaged: tensor 'a' .*{message}"):
        read_header(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
              torch.float8_e8m0fnu, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64]
)
def test_every_type_of_safetensors_is_known(tmp_path, dtype):
    save_file({"a": torch.zeros(3, dtype=torch.uint8).to(dtype)}, tmp_path / "a.safetensors")
    info = read_header(tmp_path / "a.safetensors").tensors["a"]
    assert info.shape == (3,) and info.end - info.start == 3 * dtype.itemsize


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no file .*gone"):
        read_header(tmp_path / "gone.safetensors")


def test_a_fingerprint_changes_with_every_weight_the_config_and_the_extra(tmp_path):
    weights = {f"layer{i}": torch.randn(50, 50) for i in range(3)}
    file = tmp_path / "a.safetensors"
    save_file(weights, file)
    first = fingerprint(part(file))
    save_file(weights, tmp_path / "b.safetensors", {"other": "metadata"})
    assert fingerprint(part(tmp_path / "b.safetensors")) == first
    assert fingerprint(Part(file, {"size": 2}, read_header(file).tensors, "diffusers")) != first
    assert fingerprint(part(file), [b"tokenizer"]) != first
    for name in weights:
        save_file(weights | {name: weights[name] * 1.01}, file)
        assert fingerprint(part(file)) != first


def meta_layer() -> nn.Module:
    with torch.device("meta"):
        layer = nn.BatchNorm1d(3)
    return layer


def weights(**changes):
    return {name: tensor + 1 for name, tensor in nn.BatchNorm1d(3).state_dict().items()} | changes


def test_weights_are_cast_copied_and_frozen():
    given = weights()
    layer = fill(meta_layer(), given, "cpu", torch.bfloat16, Path("x"))
    assert layer.weight.dtype == torch.bfloat16 and layer.num_batches_tracked.dtype == torch.int64
    assert not layer.weight.requires_grad and not layer.training
    given["bias"] += 1
    assert layer.bias.tolist() == [1, 1, 1]


def test_a_missing_weight_and_a_wrong_shape_name_the_file():
    given = weights()
    del given["bias"]
    with pytest.raises(UserError, match="some.file lacks 1 of 5 weights, such as bias"):
        fill(meta_layer(), given, "cpu", torch.float32, Path("some.file"))
    with pytest.raises(UserError, match=r"some.file: weight has the shape \(4,\) instead of \(3,\)"):
        fill(meta_layer(), weights(weight=torch.ones(4)), "cpu", torch.float32, Path("some.file"))
