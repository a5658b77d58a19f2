"""Files that are not what they say are refused with a sentence, whatever is wrong with them, in little memory."""

import io
import json
import pickle
import random
import struct
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import save

from trainer.errors import UserError
from trainer.export import header
from trainer.export.lora_file import open_lora

KEY = "lora_unet_conv_in"
TENSORS = {f"{KEY}.lora_down.weight": torch.ones(2, 4, 3, 3), f"{KEY}.lora_up.weight": torch.ones(320, 2, 1, 1),
           f"{KEY}.alpha": torch.tensor(2.0)}
GOOD = save(TENSORS, {"ss_network_dim": "2"})
DOWN = f"{KEY}.lora_down.weight"


def container(table, data=b"", length=None):
    """A file with this header: text, or a table that is written as JSON."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2, 2), offsets=(0, 16), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def with_entry(data=b"\0" * 16, **changes):
    return container({DOWN: entry(**changes)}, data)


def changed(**tensors):
    """The good file with other tensors, by the ending of their names."""
    return save(TENSORS | {f"{KEY}.{name.replace('_weight', '.weight')}": tensor for name, tensor in tensors.items()})


def zipped():
    stream = io.BytesIO()
    torch.save(TENSORS, stream)
    return stream.getvalue()


LENGTH = struct.unpack("<Q", GOOD[:8])[0]
MALFORMED = {
    **{f"cut at {place}": GOOD[:place] for place in [
        *range(0, 12), 20, 50, 100, 200, LENGTH, LENGTH + 7, LENGTH + 8, LENGTH + 9, len(GOOD) - 100, len(GOOD) - 1]},
    **{f"header of {length} bytes": struct.pack("<Q", length) + GOOD[8:]
       for length in (0, 1, 2, 3, LENGTH - 1, LENGTH - 60, LENGTH + 1, LENGTH + 8, len(GOOD), len(GOOD) - 8, 2**31,
                      2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)},
    **{f"shape {shape}": with_entry(shape=shape) for shape in (
        [2**62, 4], [2**40, 2**40], [10**30], [-1, -4], [2, -2], [3, 3], [0, 0], [1] * 300, ["2", 2], [2.0, 2], [None],
        [True, 4], [[2, 2]])},
    **{f"offsets {offsets}": with_entry(offsets=offsets) for offsets in (
        [-16, 0], [0, -16], [16, 0], [0, 15], [0, 17], [0, 2**63], [1, 17], [8, 24], [0], [0, 8, 16], ["0", "16"],
        [0.0, 16.0], [None, 16], [False, 16], [10**40, 10**40 + 16])},
    **{f"type {dtype}": with_entry(dtype=dtype) for dtype in ("F33", "", None, 7, ["F32"], {"F32": 1}, "f32")},
    "no type": container({DOWN: {"shape": [2, 2], "data_offsets": [0, 16]}}, b"\0" * 16),
    "no shape": container({DOWN: {"dtype": "F32", "data_offsets": [0, 16]}}, b"\0" * 16),
    "no offsets": container({DOWN: {"dtype": "F32", "shape": [2, 2]}}, b"\0" * 16),
    "an entry that is a list": container({DOWN: [1, 2]}), "an entry that is a number": container({DOWN: 1}),
    "offsets that are a number": container({DOWN: {"dtype": "F32", "shape": [2, 2], "data_offsets": 5}}, b"\0" * 16),
    "bytes behind the last": with_entry(data=b"\0" * 20), "bytes that two share": container(
        {DOWN: entry(), f"{KEY}.lora_up.weight": entry(offsets=(8, 24))}, b"\0" * 24),
    "bytes between": container({DOWN: entry(), f"{KEY}.lora_up.weight": entry(offsets=(20, 36))}, b"\0" * 36),
    "a name twice": container(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
                              b"\0" * 16),
    "metadata twice": container(b'{"__metadata__":{},"__metadata__":{}}'),
    "numbers in the metadata": container({"__metadata__": {"ss_steps": 5}}),
    "metadata that are a list": container({"__metadata__": []}),
    "metadata that are null": container(b'{"__metadata__":null}'),
    "a list": container(b"[]"), "no end": container(b'{"a":'), "not JSON": container(b"{hello}"),
    "NaN": container(b'{"a":NaN}'), "not UTF-8": container(b'{"\xff\xfe":1}'),
    "deep": container(b'{"a":' + b"[" * 90000), "many": container(b'{"a":[' + b"[]," * 1_000_001),
    "surrogates": container(b'{"\\ud800":1}'), "half a letter in the metadata": container(
        b'{"__metadata__":{"modelspec.title":"\\ud800"},' + json.dumps({DOWN: entry()}).encode()[1:], b"\0" * 16),
    "no tensors": container({}), "only metadata": container({"__metadata__": {"a": "b"}}),
    "a zip of pickles": zipped(), **{f"pickle {number}": pickle.dumps({"a": 1}, number) for number in range(6)},
    "a zip": b"PK\x03\x04" + b"\0" * 40, "a web page": b"<!DOCTYPE html><html></html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
    "zeros": b"\0" * 64, "ones": b"\xff" * 64,
    **{f"noise {seed}": random.Random(seed).randbytes(200) for seed in range(8)},
    "alpha of two numbers": changed(alpha=torch.ones(2)), "alpha without any": changed(alpha=torch.ones(0)),
    "alpha of whole numbers": changed(alpha=torch.tensor(2)),
    "ranks that differ": changed(lora_up_weight=torch.ones(320, 3, 1, 1)),
    "a flat half": changed(lora_up_weight=torch.ones(320, 2)), "a vector": changed(lora_down_weight=torch.ones(8)),
    "a cube": changed(lora_down_weight=torch.ones(2, 4, 3)),
    "a wide up": changed(lora_up_weight=torch.ones(320, 2, 3, 3)),
    "whole numbers": changed(lora_down_weight=torch.ones(2, 4, 3, 3, dtype=torch.int8)),
    "no rank": changed(lora_down_weight=torch.ones(0, 4, 3, 3), lora_up_weight=torch.ones(320, 0, 1, 1)),
    "no columns": changed(lora_down_weight=torch.ones(2, 0, 3, 3)),
    "absurd rank": changed(lora_down_weight=torch.ones(5000, 1, 1, 1), lora_up_weight=torch.ones(1, 5000, 1, 1)),
    "Tucker": changed(lora_mid_weight=torch.ones(2, 2, 3, 3)), "LoHa": save({f"{KEY}.hada_w1_a": torch.ones(2, 2)}),
    "a base model": save({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)}),
    "rows that are not three": save({
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 6),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(19, 2)}),
}


def test_the_good_file_is_read(tmp_path):
    (tmp_path / "good.safetensors").write_bytes(GOOD)
    lora = open_lora(tmp_path / "good.safetensors")
    assert list(lora.entries) == [KEY] and lora.metadata == {"ss_network_dim": "2"} and lora.scale(KEY) == 1.0
    assert len(MALFORMED) >= 100


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_in_a_sentence(tmp_path, name):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(UserError) as caught:
        open_lora(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and len(text) < len(str(path)) + 400 and "\n" not in text


@pytest.mark.parametrize(("name", "words"), [
    ("cut at 0", "it is empty"), ("cut at 100", "it is cut short, or no safetensors file"),
    (f"cut at {len(GOOD) - 1}", "is cut short: tensor 'lora_unet_conv_in"), ("a name twice", "names 'a' twice"),
    ("shape [10, 10]", None), ("shape [-1, -4]", "the impossible shape [-1, -4]"),
    ("a zip of pickles", "it is a pickle"), ("offsets [-16, 0]", "the impossible place [-16, 0]"),
    ("a web page", "it is a web page"), ("a pointer", "git lfs pull"),
    ("ranks that differ", "do not fit each other: up [320, 3, 1, 1], down [2, 4, 3, 3]"), ("LoHa", "it is a LoHa file"),
    ("absurd rank", "the rank of lora_unet_conv_in is 5000"), ("a base model", "it is a base model, or"),
    ("bytes between", "begins at byte 20 of the data instead of 16"), ("many", "more entries than any LoRA's")])
def test_the_sentence_says_what_it_is(tmp_path, name, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(MALFORMED[name] if words else with_entry(shape=(10, 10)))
    with pytest.raises(UserError) as caught:
        open_lora(path)
    assert (words or "has 16 bytes instead of 400") in str(caught.value)


def test_no_file_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(UserError, match="there is no file"):
            header.read(path)


def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path):
    """Never another error: each byte of the header once, and random pairs."""
    rng, path = random.Random(0), tmp_path / "bad.safetensors"
    refused = 0
    for place in [*range(8 + LENGTH), *rng.choices(range(8 + LENGTH), k=200)]:
        content = bytearray(GOOD)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            open_lora(path)
        except UserError:
            refused += 1
    assert refused > 200


def flat(count):
    """A header of this many values under names of their own."""
    return container(b"{" + b",".join(b'"%x":1' % number for number in range(count)) + b"}")


def test_a_name_twice_at_the_end_of_many_is_found_at_once(tmp_path):
    """A search from the beginning for every name would take minutes."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(flat(200_000).replace(b'"30d3e":1,"30d3f"', b'"30d3f":1,"30d3f"'))
    start = time.perf_counter()
    with pytest.raises(UserError, match="names '30d3f' twice"):
        header.read(path)
    assert time.perf_counter() - start < 20


def test_refusing_takes_little_memory(tmp_path):
    """A gigabyte of header, headers of a million lists, of long lists, of many names, and of long numbers."""
    contents = {
        "lists": container(b'{"a":[' + b"[]," * 300_000 + b"[]]}"), "many": MALFORMED["many"],
        "names": flat(3_000_000), "fewer names": flat(header.MOST_VALUES - 2),
        "numbers": container(b'{"a":[' + b"1," * 2_000_000 + b"1]}"),
        "digits": container(b'{"a":' + b"1" * 5_000_000 + b"}"), "deep": MALFORMED["deep"]}
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    del contents, content
    with (tmp_path / "vast.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**30) + b'{"a":')
        file.truncate(2**31)  # takes no room on the disk
    tracemalloc.start()
    try:
        for path in tmp_path.iterdir():
            with pytest.raises(UserError):
                open_lora(path)
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally:
        tracemalloc.stop()
