"""Files written anew: the same tensors but for those that change, hashes true, nothing half-written."""

import hashlib
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.export.rewrite import rewrite
from trainer.families.tensors import read_header


@pytest.fixture
def source(tmp_path):
    tensors = {"a": torch.randn(40, 3), "b": torch.arange(7), "c": torch.randn(5).half(), "é \"x\"": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    return read_header(tmp_path / "a.safetensors")


def data(path):
    content = path.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


def test_without_a_change_the_data_are_the_same_bytes(source, tmp_path):
    rewrite(source, tmp_path / "b.safetensors", lambda info: None, {})
    assert data(tmp_path / "b.safetensors") == data(source.file)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() is None and sorted(file.keys()) == sorted(source.tensors)


def test_one_tensor_is_changed_and_hashes_are_made_anew(source, tmp_path):
    said = {"sshs_model_hash": "old", "modelspec.hash_sha256": "old", "sshs_legacy_hash": "old", "note": "é"}
    two = 2 * torch.ones(5).half()
    rewrite(source, tmp_path / "b.safetensors", lambda info: two if info.name == "c" else None, said)
    found = load_file(tmp_path / "b.safetensors")
    assert found["c"].eq(2).all() and torch.equal(found["a"], load_file(source.file)["a"])
    digest = hashlib.sha256(data(tmp_path / "b.safetensors")).hexdigest()
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}", "note": "é"}


def test_a_fault_on_the_way_leaves_the_old_file(source, tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"old")

    def fail(info):
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        rewrite(source, tmp_path / "b.safetensors", fail, {})
    with source.file.open("r+b") as file:
        file.truncate(source.file.stat().st_size - 8)
    with pytest.raises(UserError, match="is cut short"):
        rewrite(source, tmp_path / "b.safetensors", lambda info: None, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"
