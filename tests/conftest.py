"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from app.datasets.data_set import DataSet
from app.datasets.library import Library
from app.paths import Places
from tests import data_sets, projects
from trainer import gpu
from trainer.__main__ import main

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `exact`: read when a GPU first multiplies


class Outcome(NamedTuple):
    """What a shell sees of a command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Runs collect garbage at every stage; what all test files share need not be looked through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset of a tiny project, made once; read it, don't change it."""
    return projects.make(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def _arithmetic() -> Iterator[None]:
    """How a test's runs let this process compute does not stay for the next test."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.conv.fp32_precision
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.conv.fp32_precision = before[1]


@pytest.fixture
def exact() -> None:
    """A GPU repeats itself to the bit, and computes fp32 in fp32: what presets ask for, without a preset."""
    gpu.choose_arithmetic("fp32", deterministic=True)


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


@pytest.fixture
def trainer(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`python -m trainer` with these arguments, in this process."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        with open(1, "w", closefd=False) as out, open(2, "w", closefd=False) as err, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            code = main([str(item) for item in arguments])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    """A workspace, and a folder outside of it that the app may read."""
    (tmp_path / "pictures").mkdir()
    made = Library(Places(tmp_path / "workspace", (tmp_path / "pictures",)))
    yield made
    made.close()


@pytest.fixture
def cats(library: Library) -> DataSet:
    """Three images with captions at the top and two in a sub-folder."""
    root = library.places.datasets / "cats"
    for seed, (name, caption) in enumerate([
            ("a.png", "red, cat\nsecond line\n"), ("b.png", "blue, cat"), ("c.png", None), ("5_more/d.png", "red, dog"),
            ("5_more/e.jpg", "Red, bird, masterpiece")]):
        data_sets.draw(root / name, seed=seed, caption=caption)
    [own] = library.list_sets()["sets"]
    return library.open(own["id"])
