"""Which images of a run are the hardest, as its file grows, is resumed and replaced."""

import random

import pytest

from app.hardest import MOST, Hardest
from trainer import run
from trainer.events import EventWriter


@pytest.fixture
def ours(tmp_path):
    return run.create(tmp_path, "a", "version = 1\n")


def names(hardest, ours, most=MOST):
    return [image.file for image in hardest.of(ours, most)[0]]


def test_the_hardest_come_first_and_one_unlucky_look_is_not_the_worst(ours):
    writer, hardest = EventWriter(ours.events), Hardest()
    writer.write("image_loss", step=10, images={"easy": [10, 0.5], "hard": [10, 2.0], "unlucky": [1, 3.0]})
    [worst, *others], *counts = hardest.of(ours, 2)
    assert (worst.file, worst.times, worst.ratio, counts) == ("hard", 10, 2.0, [2, 3])
    assert [image.file for image in others] == ["unlucky"]
    writer.write("image_loss", step=20, images={"unlucky": [9, 3.0], "easy": [2, 0.5]})
    assert names(hardest, ours) == ["unlucky", "hard"]  # the easy one is not hard
    assert hardest.of(ours, 1)[0][0].times == 10


def test_a_course_has_a_mean_for_each_part_and_nothing_where_it_was_not_seen(ours):
    writer = EventWriter(ours.events)
    for step in range(1, 401):
        images = {"often": [1, 1.0 if step <= 200 else 3.0]} | ({"late": [2, 1.5]} if step > 300 else {})
        writer.write("image_loss", step=step, images=images)
    [often, late], *_ = Hardest().of(ours, MOST)
    assert often.times == 400 and often.ratio == 2.0 and late.times == 200
    assert often.course[:10] == [1.0] * 10 and often.course[11:] == [3.0] * 9
    assert late.course[:15] == [None] * 15 and late.course[15:] == [1.5] * 5


def test_a_resume_takes_back_what_came_after_its_step(ours):
    writer, hardest = EventWriter(ours.events), Hardest()
    writer.write("image_loss", step=10, images={"a": [1, 1.1]})
    writer.write("image_loss", step=20, images={"a": [1, 9.0], "gone": [5, 9.0]})
    assert names(hardest, ours) == ["gone", "a"]
    writer.write("start", step=10, steps=99)
    writer.write("image_loss", step=20, images={"a": [1, 2.9]})
    [only], *_ = hardest.of(ours, MOST)
    assert (only.file, only.times, only.ratio) == ("a", 2, 2.0)


def test_what_is_no_loss_is_passed_over_and_a_replaced_file_read_anew(ours, tmp_path):
    writer, hardest = EventWriter(ours.events), Hardest()
    writer.write("image_loss", step=1, images={"a": [1], "b": "x", "c": [0, 1.0], "d": [1, None], "e": ["1", 2.0]})
    writer.write("image_loss", step=2, images=[1])
    writer.write("image_loss", step=3)
    assert hardest.of(ours, MOST) == ([], 0, 0)
    writer.write("image_loss", step=4, images={"old": [1, 2.0]})
    assert names(hardest, ours) == ["old"]
    EventWriter(tmp_path / "other").write("image_loss", step=1, images={"new": [1, 2.0], "usual": [5, 1.001]})
    (tmp_path / "other").replace(ours.events)
    assert names(hardest, ours) == ["new"]


def test_no_more_than_the_page_shows_are_told_of_however_many_there_are(ours):
    noise, writer = random.Random(0), EventWriter(ours.events)
    for step in range(1, 40):
        writer.write("image_loss", step=step, images={str(number): [1, 2 + noise.random()] for number in range(500)})
    images, *counts = Hardest().of(ours, 10**6)
    assert (len(images), counts) == (MOST, [500, 500])
