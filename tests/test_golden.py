"""The published traces, replayed to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import golden

FILES = [Path(golden.__file__).parent / "golden" / f"golden_{name}.safetensors" for name in ("stella", "stiefel")]
CASES = [case for file in FILES for case in golden.read_cases(file) if case.judged]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_traces_are_followed_to_the_last_digit(case):
    assert max(golden.replay(case).values()) <= golden.TOLERANCE[case.dtype]


def test_every_published_case_is_replayed():
    assert len([case for case in CASES if case.stella]) == 8
    assert len([case for case in CASES if case.name.startswith("v1_")]) == 6


def test_the_command_says_which_case_is_off(tmp_path, capsys):
    from safetensors import safe_open

    tensors = load_file(FILES[1])
    with safe_open(FILES[1], "pt") as trace:
        settings = trace.metadata()
    tensors["v1_mom0_wd0/step3/param/A"] += 1e-5 * torch.ones(())
    save_file(tensors, tmp_path / "off.safetensors", metadata=settings)
    assert golden.main([str(tmp_path / "off.safetensors")]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["v1_mom0_wd0"].endswith("FAILED")
    assert lines["v1_dora"].endswith("ok")
