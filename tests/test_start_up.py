"""The start-up bench: its bases are such as people keep, and its report says where the time went."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import base_files, start_up
from trainer import preset, session


@pytest.mark.parametrize("case, layouts", [
    ("sd15", {"unet": "ldm", "vae": "ldm", "text_encoder": "ldm"}),
    ("klein-4b", {"transformer": "bfl", "vae": "ldm", "text_encoder": "hf"})])
def test_bases_are_opened_as_the_files_that_people_keep(tmp_path: Path, case: str, layouts: dict[str, str]) -> None:
    base = session.open_base(preset.load(start_up.make(case, tmp_path, 1, tiny=True), []))
    assert {name: part.layout for name, part in base.parts.items()} == layouts


def test_true_sizes_are_those_of_the_models() -> None:
    counts = {case: sum(tensor.numel() for tensor in base_files.denoiser(start_up.SIZES[case]).values())
              for case in ("sd15", "klein-4b")}
    assert counts["sd15"] == 859_520_964 and 3.8e9 < counts["klein-4b"] < 4.0e9


def test_parts_add_up_to_the_time_until_the_step() -> None:
    events = [{"t": 2.0, "kind": "start"}, {"t": 2.5, "kind": "phase", "name": "reading images"},
              {"t": 3.5, "kind": "phase", "name": "reading images"}, {"t": 5.0, "kind": "step"}]
    found = start_up.parts(1.0, events)
    assert found == [("Python, imports", 1.0), ("after start", 0.5), ("reading images", 2.5)]
    log = "import time:  100 | 3000000 |   torch.nn\nimport time: 2000000 | 9 | torch.nn.init\nimport time: 1 | 1 | io"
    assert start_up.slowest_imports(log, 1) == ["  2.00 s  torch.nn"]
