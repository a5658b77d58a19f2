"""GPUs as the driver's tool tells them, and none where there is no driver."""

from app import cards


def test_the_drivers_table_is_read():
    assert cards.parse("0, NVIDIA GeForce RTX 4090, 24564\n1, NVIDIA H200, [N/A]\nan error\n") == [
        {"index": 0, "name": "NVIDIA GeForce RTX 4090", "gib": 24}, {"index": 1, "name": "NVIDIA H200", "gib": None}]


def test_a_machine_without_a_driver_has_none(monkeypatch):
    monkeypatch.setattr(cards.shutil, "which", lambda name: None)
    assert cards._ask() == []


def test_a_tool_that_fails_tells_of_none(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, broken, 1'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(cards.shutil, "which", lambda name: str(tool))
    assert cards._ask() == []
    tool.write_text("#!/bin/sh\necho '0, Card, 8192'\n")
    assert cards._ask() == [{"index": 0, "name": "Card", "gib": 8}]
