"""Whether an adapter is any good: a validation loss that compares, pictures that say how they were made, distances."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from tests import projects
from trainer import evaluation
from trainer.events import Event, EventReader
from trainer.session import Session


@pytest.fixture(scope="module")
def session(tiny_project, tmp_path_factory) -> Session:
    return projects.session(tiny_project, tmp_path_factory.mktemp("session"), "evaluate.distance=efflite0",
                            "evaluate.images=4", "evaluate.quantiles=3", "sample.negative=blurry", "output.weights=raw")


def last(session: Session, kind: str) -> Event:
    return [event for event in EventReader(session.run.events).read() if event["kind"] == kind][-1]


def test_validation_is_the_mean_over_quantiles_and_repeats_to_the_bit(session) -> None:
    loss = evaluation.validate(session, 3)
    torch.manual_seed(99)
    assert evaluation.validate(session, 3) == loss
    event = last(session, "validation")
    assert event["step"] == 3 and event["loss"] == loss and len(event["by_quantile"]) == 3
    assert loss == pytest.approx(sum(event["by_quantile"]) / 3, abs=1e-6)
    assert session.progress.validation["3"] == loss


def test_validation_does_not_depend_on_the_batch_size(session) -> None:
    loss, train = evaluation.validate(session, 1), session.preset.train
    before = session.preset
    session.preset = before.model_copy(update={"train": train.model_copy(update={"batch_size": 1})})
    assert evaluation.validate(session, 1) == pytest.approx(loss, rel=1e-5)
    session.preset = before


def test_without_held_out_images_there_is_no_validation(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path, "evaluate.folder=")
    assert evaluation.validate(session, 1) is None
    evaluation.measure_distance(session, 1)
    assert {event["kind"] for event in EventReader(session.run.events).read()} == {"phase", "data"}


def test_a_picture_says_how_it_was_made(session) -> None:
    evaluation.draw_samples(session, 5, "raw")
    event = last(session, "sample")
    assert event["images"] == ["samples/000005_00.png"] and event["weights"] == "raw" and not event["asked"]
    with Image.open(session.run.path / event["images"][0]) as picture:
        facts = json.loads(picture.text["parameters"])
        assert picture.size == (64, 64)
    assert facts == {"prompt": "a red circle", "seed": 1, "steps": 2, "guidance": 5.0, "negative": "blurry", "step": 5}


def test_the_same_step_gives_the_same_picture(session) -> None:
    def drawn() -> bytes:
        evaluation.draw_samples(session, 6, "raw")
        return (session.run.samples / "000006_00.png").read_bytes()

    assert drawn() == drawn()


def test_pictures_asked_for_never_replace_those_of_the_rhythm(session) -> None:
    evaluation.draw_samples(session, 7, "raw")
    kept = (session.run.samples / "000007_00.png").read_bytes()
    for number in range(2):
        evaluation.draw_samples(session, 7, "raw", ["a new prompt", "another"], asked=True)
        names = [f"samples/000007_asked{number}_{index:02d}.png" for index in range(2)]
        assert last(session, "sample")["images"] == names
    assert (session.run.samples / "000007_00.png").read_bytes() == kept
    assert not list(session.run.samples.glob("*.tmp"))


def test_distances_come_with_intervals_counts_and_the_bases_own(session, monkeypatch) -> None:
    with torch.no_grad():
        for leaf in session.adapter.parameters():
            leaf.add_(0.05)
    evaluation.measure_distance(session, 8)
    event = last(session, "distance")
    assert event["step"] == 8 and event["extractor"] == "efflite0"
    assert (event["n_ref"], event["n_gen"]) == (4, 4)
    assert event["kid_low"] <= event["kid"] <= event["kid_high"]
    assert event["base_kid_low"] <= event["base_kid"] <= event["base_kid_high"]
    assert event["fd"] != event["base_fd"]  # the adapter does something

    drawn: list[str] = []
    real = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *given: drawn.append(given[3]) or real(*given))
    evaluation.measure_distance(session, 9)
    assert drawn == [session.shown_weights]  # the base's own pictures are drawn once
    assert last(session, "distance")["base_fd"] == event["base_fd"]
    session.progress.matmul = "int8"  # which makes other pictures
    evaluation.measure_distance(session, 12)
    session.progress.matmul = "off"
    assert drawn[1:] == ["off", session.shown_weights]
