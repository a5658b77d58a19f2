"""Runs take turns on a GPU; a lock needs no GPU to be tested."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from trainer import gpu


def test_the_second_run_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    device, order, waited = torch.device("cuda", 0), [], []

    def second() -> None:
        with gpu.turn(tmp_path, device, lambda: waited.append(1)):
            order.append("second")

    with gpu.turn(tmp_path, device, lambda: None):
        thread = threading.Thread(target=second)
        thread.start()
        while not waited:
            time.sleep(0.01)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_a_card_is_known_by_its_own_id_whatever_its_number(monkeypatch) -> None:
    class Facts:
        uuid = "GPU-1234"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    assert gpu.identity(torch.device("cuda", 0)) == gpu.identity(torch.device("cuda", 3)) == "GPU-1234"


def test_another_gpu_and_a_cpu_are_free(tmp_path: Path) -> None:
    def never() -> None:
        raise AssertionError("nobody should wait")

    with gpu.turn(tmp_path, torch.device("cuda", 0), never), gpu.turn(tmp_path, torch.device("cuda", 1), never), \
            gpu.turn(tmp_path, torch.device("cpu"), never), gpu.turn(tmp_path, torch.device("cpu"), never):
        assert sorted(path.name for path in tmp_path.glob("*.lock")) == ["gpu-0.lock", "gpu-1.lock"]


def test_torch_uses_no_more_threads_than_there_are_cores_for_it(monkeypatch) -> None:
    before, counts = torch.get_num_threads(), []
    try:
        for cores, sharing in ((4, 1), (4, 2), (4, 8), (64, 1)):
            torch.set_num_threads(6)
            monkeypatch.setattr(gpu, "usable", lambda cores=cores: cores)
            gpu.use_cores(sharing)
            counts.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert counts == [4, 2, 1, 6]
