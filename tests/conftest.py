"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import projects


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset of a tiny project, made once; read it, don't change it."""
    return projects.make(tmp_path_factory.mktemp("project"))


@pytest.fixture
def own_project(tiny_project: Path, tmp_path: Path) -> Path:
    """The preset of a copy whose pictures may be changed; the base model is shared."""
    for name in ("train", "held"):
        shutil.copytree(tiny_project.parent / name, tmp_path / name)
    text = tiny_project.read_text("utf-8")
    for name in ("train", "held"):
        text = text.replace((tiny_project.parent / name).as_posix(), (tmp_path / name).as_posix())
    preset = tmp_path / "tiny.toml"
    preset.write_text(text, "utf-8")
    return preset
