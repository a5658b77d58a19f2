"""Cache: what was put comes back to the bit; anything damaged is as good as absent."""

import pytest
import torch

from trainer.data.cache import Cache
from trainer.errors import UserError

TENSORS = {"latents": torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)),
           "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
           "mask": torch.tensor([True, False])}


def filled(tmp_path):
    cache, key = Cache(tmp_path / "cache"), Cache.key("a", 1)
    cache.put(key, TENSORS)
    return cache, key, tmp_path / "cache" / key[:2] / f"{key}.safetensors"


def test_tensors_come_back_to_the_bit(tmp_path):
    cache, key, _ = filled(tmp_path)
    found = cache.get(key)
    assert found.keys() == TENSORS.keys() and cache.has(key)
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
               for name, tensor in TENSORS.items())


def test_keys_tell_their_parts_apart():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (12,), ("1", "2"), ("1,2",), (True, 2), (1.0, 2), (None,), ()]
    assert len({Cache.key(*part) for part in parts}) == len(parts)
    assert all(len(Cache.key(*part)) == 64 for part in parts)


def test_an_absent_key_is_none(tmp_path):
    assert Cache(tmp_path).get(Cache.key("b")) is None and not Cache(tmp_path).has(Cache.key("b"))


def test_a_file_cut_anywhere_counts_as_absent_is_removed_and_can_be_put_again(tmp_path):
    cache, key, path = filled(tmp_path)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert cache.get(key) is None and not path.exists()
    cache.put(key, TENSORS)
    assert path.read_bytes() == whole


def test_a_flipped_bit_anywhere_is_never_handed_out(tmp_path):
    cache, key, path = filled(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        found = cache.get(key)
        assert found is None or (found.keys() == TENSORS.keys() and all(
            torch.equal(found[name], tensor) for name, tensor in TENSORS.items())), place


def test_nothing_is_left_beside_the_entries(tmp_path):
    filled(tmp_path)
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".safetensors"]


def test_a_cache_that_cannot_be_written_is_a_plain_message(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cache in .* cannot be written: .*; free some space"):
        Cache(tmp_path / "cache").put(Cache.key("a"), TENSORS)
