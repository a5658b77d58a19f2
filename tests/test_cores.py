"""How many cores there are to use, and how threads wait for one another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.bench.waiting import busy
from trainer import cores
from trainer.cores import WAIT, quota
from trainer.housekeeping import SPECTRA

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "150000 100000\n"}, 1.5), ({"cpu.max": "max 100000\n"}, None), ({}, None),
    ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None)])
def test_a_containers_quota_of_cores_is_known(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == cores


@pytest.mark.parametrize("idle, chosen", [(2.0, {}), (1.6, {}), (1.4, {WAIT: "PASSIVE"}), (0.0, {WAIT: "PASSIVE"}),
                                          (60.0, {})])
def test_threads_sleep_only_where_other_programs_use_the_cores(monkeypatch, idle: float, chosen: dict) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(cores, "usable", lambda: 2)
    monkeypatch.setattr(cores, "idle", lambda: idle)
    environment: dict[str, str] = {}
    cores.choose_waiting(environment)
    assert environment == chosen


def test_a_users_own_choice_of_waiting_stays(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(cores, "idle", lambda: 0.0)
    environment = {WAIT: "ACTIVE"}
    cores.choose_waiting(environment)
    assert environment == {WAIT: "ACTIVE"}


def test_busy_programs_are_seen() -> None:
    count = psutil.cpu_count() or 1
    with busy(count):
        assert cores.idle() < 0.5 * count


@pytest.mark.parametrize("package, option", [("trainer", "--preset"), ("trainer.caption", "--task"),
                                             ("trainer.tryout", "--task")])
def test_the_choice_comes_before_torch_is_loaded(package: str, option: str) -> None:
    """Its threads read it once."""
    code = ("import sys; from trainer import cores\n"
            "cores.choose_waiting = lambda environment: sys.exit(f\"chosen, torch loaded: {'torch' in sys.modules}\")\n"
            f"from {package}.__main__ import main\nmain(['{option}', 'demo.toml'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "chosen, torch loaded: False"


def test_the_spectra_have_no_team_of_threads_beside_the_steps() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert SPECTRA.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
