"""Curves of a run in few points that still add up, and only pictures that are its own."""

import os

import pytest

from tests.run_folders import finished
from trainer import curves
from trainer.curves import Shot
from trainer.events import EventWriter


def test_a_long_run_becomes_few_points_whose_means_weigh_as_many_steps_as_they_stand_for(tmp_path):
    found = curves.read(finished(tmp_path, "a", steps=2000, validation=0.3))
    assert len(found.loss["step"]) <= curves.MOST and found.loss["step"][-1] == 2000
    assert sum(found.loss["n"]) == 2000
    total = sum(mean * count for mean, count in zip(found.loss["mean"], found.loss["n"]))
    assert total == pytest.approx(sum(1 / step for step in range(1, 2001)), rel=1e-3)
    assert found.validation["step"][-1] == 2000 and found.validation["loss"][-1] == 0.3
    assert found.rank == {"step": [2000], "mean": [4.0]}


def test_smoothing_has_no_bias_and_knows_how_many_steps_a_point_is():
    assert curves.smooth({"mean": [2.0, 2.0], "n": [1, 50]}, 0.9) == pytest.approx([2.0, 2.0])
    ten = curves.smooth({"mean": [1.0] + [3.0] * 10, "n": [1] * 11}, 0.9)[-1]
    assert curves.smooth({"mean": [1.0, 3.0], "n": [1, 10]}, 0.9)[-1] == pytest.approx(ten)


def test_pictures_that_lie_elsewhere_are_not_shown(tmp_path):
    run = finished(tmp_path, "a")
    run.samples.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (run.samples / "a.png").write_bytes(b"x")
    os.symlink(tmp_path / "secret.png", run.samples / "link.png")
    events = EventWriter(run.events)
    names = ["samples/a.png", "samples/link.png", "../../secret.png", "samples/../../../secret.png", "preset.toml",
             str(tmp_path / "secret.png"), "samples/gone.png", "samples/a\0.png"]
    events.write("sample", step=100, images=names, prompts=[f"p{index}" for index in range(len(names))], seed=7)
    assert curves.read(run).shots == [Shot(100, "p0", 7, "samples/a.png")]


def test_steps_that_all_runs_drew_come_before_those_that_one_did():
    def shots(*steps):
        return [Shot(step, "p", 1, "f") for step in steps]

    assert curves.shared_steps([shots(0, 50, 100), shots(0, 50)]) == [0, 50]
    assert curves.shared_steps([shots(1), shots(2), []]) == [1, 2]
    assert curves.shared_steps([]) == []
