"""The presets that ship: each one checks and trains, on the tiny model of its family, as a user would start it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import family_runs, projects
from trainer import preset as presets
from trainer.events import EventReader
from trainer.run import Run

SHIPPED = sorted(path for path in presets.SHIPPED.glob("*.toml") if path.stem != "demo")  # test_demo runs that
SMALL = ["data.resolution=64", "train.steps=2", "train.warmup_steps=0", "sample.steps=1", "sample.before=false",
         'sample.prompts=["a cat"]', "evaluate.distance=off", "evaluate.quantiles=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return projects.pictures(tmp_path_factory.mktemp("pictures") / "mine", 4)


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_a_shipped_preset_checks_and_trains(path, pictures, tmp_path, trainer) -> None:
    family = presets.load(path).model.family
    settings = [f"model.base={family_runs.MAKERS[family](tmp_path / 'base')}", f"data.folder={pictures}", *SMALL]
    command = ["--preset", path.name, "--workspace", tmp_path, *(f"--set={setting}" for setting in settings)]
    checked = trainer(*command, "--check", "--json")
    assert checked.code == 0 and json.loads(checked.out)["errors"] == [], checked.out
    outcome = trainer(*command)
    assert outcome.code == 0, outcome.err
    run = Run(tmp_path / "runs" / path.stem)
    kinds = [event["kind"] for event in EventReader(run.events).read()]
    assert run.state().word == "done" and run.result.is_file()
    assert {"validation", "sample", "export"} <= set(kinds) and kinds.count("step") == 2


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_a_preset_of_a_large_model_names_its_size_and_comfyuis_files(path) -> None:
    """What its opening promises can be given: each setting it names exists."""
    text = path.read_text("utf-8")
    named = re.findall(r"--set (\w+)\.(\w+)=", text)
    assert ("model", "base") in named and ("data", "folder") in named
    fields = presets.load(path).model_dump()
    assert all(key in fields[section] for section, key in named)
    assert re.search(r"about [\d.]+ GB", text)


def test_the_table_of_presets_has_them_all() -> None:
    table = (presets.SHIPPED / "README.md").read_text("utf-8")
    for path in presets.SHIPPED.glob("*.toml"):
        row, = (line for line in table.splitlines() if line.startswith(f"| [`{path.name}`]({path.name}) |"))
        preset = presets.load(path)
        assert preset.adapter.method in row.split("|")[3] and Path(preset.model.base).name in row
