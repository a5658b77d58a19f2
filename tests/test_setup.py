"""What a run leaves out of its preparation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import projects
from trainer import preset as presets
from trainer.setup import _text_modes


@pytest.mark.parametrize("cached, found", [({"fp8"}, ["fp8"]), ({"none", "nf4"}, ["none"])])
def test_texts_that_are_all_cached_settle_how_they_are_encoded_and_nothing_is_loaded(
        tiny_project: Path, cached: set[str], found: list[str]) -> None:
    def store(mode: str) -> Any:
        return SimpleNamespace(missing=lambda: [] if mode in cached else ["a cat"])

    preset, gpu = presets.load(tiny_project), SimpleNamespace(limit=1)
    assert _text_modes(preset, None, None, torch.device("cpu"), None, gpu, store) == found  # there is no family to ask
    cached.clear()
    with pytest.raises(AttributeError, match="load_text_encoder"):
        _text_modes(preset, None, None, torch.device("cpu"), None, gpu, store)


def test_a_run_with_cached_texts_loads_no_library_for_them() -> None:
    code = ("from trainer import lean; lean.begin(); import sys, trainer.loop; from trainer import families\n"
            "for name in ('sd15', 'sdxl', 'flux1', 'flux2'): families.get(name)\n"
            "print(*{'transformers', 'peft', 'bitsandbytes'} & set(sys.modules))\n"
            "import transformers; transformers.CLIPTokenizer")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_torch_computes_as_the_preset_asks(exact: None, tiny_project: Path, tmp_path: Path) -> None:
    found = []
    for name, changes in (("usual", ()), ("asked", ("train.precision=fp32", "train.deterministic=true"))):
        projects.session(tiny_project, tmp_path, *changes, name=name)
        found.append((torch.backends.cudnn.conv.fp32_precision, torch.are_deterministic_algorithms_enabled()))
    assert found == [("tf32", False), ("ieee", True)]
