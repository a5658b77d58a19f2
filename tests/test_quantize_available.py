"""A device that cannot hold quantised weights is told of before the work, in plain words."""

from __future__ import annotations

import sys

import pytest
import torch

from trainer.errors import UserError
from trainer.quantize import kernels
from trainer.quantize.available import check, check_settings
from trainer.quantize.model import MODES

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_a_cpu_holds_every_mode(mode):
    check(mode, CPU)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_bitsandbytes_that_cannot_be_loaded_says_what_to_do(monkeypatch, mode):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=rf"memory.quantize = '{mode}' needs the package bitsandbytes.*pip install "
                                        "bitsandbytes.*set it to 'fp8' or 'none'"):
        check(mode, CPU)
    check("fp8", CPU)


class Broken:
    """bitsandbytes as it is on a device for which it was not built."""

    @staticmethod
    def quantize_4bit(*_, **__) -> None:
        raise RuntimeError("Method 'cquantize' not available in CPU-only version of bitsandbytes.\nReinstall")


def test_missing_kernels_name_the_setting_and_the_device(monkeypatch):
    monkeypatch.setattr(kernels, "bitsandbytes", lambda: Broken)
    with pytest.raises(UserError, match=r"memory.quantize_text_encoder = 'nf4': bitsandbytes has no working kernels "
                                        r"for this device \(cpu: Method 'cquantize' not available in CPU-only version "
                                        r"of bitsandbytes\.\).*'fp8' or 'none'$"):
        check("nf4", CPU, "memory.quantize_text_encoder")


def test_settings_left_to_auto_are_not_asked_about(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_settings("auto", "none", CPU)
    with pytest.raises(UserError, match="memory.quantize_text_encoder = 'int8' needs the package bitsandbytes"):
        check_settings("fp8", "int8", CPU)


def test_a_check_and_a_run_say_so_before_anything_is_loaded(tiny_project, trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    arguments = ("--preset", tiny_project, "--workspace", tmp_path, "--set", "memory.quantize=nf4")
    for more in ((), ("--check",)):
        outcome = trainer(*arguments, *more)
        assert outcome.code == 1
        assert "memory.quantize = 'nf4' needs the package bitsandbytes" in outcome.out + outcome.err
        assert not list(tmp_path.glob("cache/*/*"))
