"""The tagger sees images as WD14 does and says the tags above its thresholds."""

import csv

import pytest
from PIL import Image

from tests import models_caption
from trainer.caption.tagger import Tagger
from trainer.errors import UserError

WHITE = Image.new("RGB", (8, 8), "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models_caption.tagger(tmp_path_factory.mktemp("tagger"))


def tagger(folder, **changed):
    settings = {"threshold": 0.35, "character_threshold": 0.85, "blacklist": (), "underscores": False}
    return Tagger(folder, **settings | changed)


def test_characters_come_first_then_tags_by_probability_without_ratings(folder):
    assert tagger(folder).caption([WHITE]) == ["alice (story), long hair, red circle, ^_^, blue sky"]


def test_channels_come_blue_first(folder):
    """Tags look at blue, green, red in turn: of pure blue, only the first and fourth see anything."""
    assert tagger(folder).caption([Image.new("RGB", (8, 8), (0, 0, 255))]) == ["^_^"]
    assert tagger(folder).caption([Image.new("RGB", (8, 8), (255, 0, 0))]) == ["red circle, blue sky"]
    assert tagger(folder).caption([Image.new("RGB", (8, 8), (0, 255, 0))]) == ["alice (story), long hair"]


def test_an_oblong_image_lies_on_a_white_square(folder):
    black = Image.new("RGB", (64, 32))
    assert tagger(folder, threshold=0.49, character_threshold=0.49).caption([black]) == [
        "alice (story), long hair, red circle"]  # half of it is white
    assert tagger(folder, threshold=0.51, character_threshold=0.51).caption([black]) == [""]


@pytest.mark.parametrize(("settings", "tags"), [
    ({"threshold": 0.6}, "alice (story), long hair, red circle"),
    ({"character_threshold": 1.0, "threshold": 1.0}, "alice (story), long hair, red circle"),
    ({"blacklist": ["Long Hair", "^_^", "alice_(story)"]}, "red circle, blue sky"),
    ({"underscores": True}, "alice_(story), long_hair, red_circle, ^_^, blue_sky"),
])
def test_thresholds_blacklist_and_underscores(folder, settings, tags):
    assert tagger(folder, **settings).caption([WHITE]) == [tags]


def test_a_character_needs_its_own_threshold(folder):
    grey = Image.new("RGB", (8, 8), (204, 204, 204))  # 0.8
    assert "alice" not in tagger(folder).caption([grey])[0]
    assert "alice" in tagger(folder, character_threshold=0.79).caption([grey])[0]


def test_a_batch_baked_into_the_model_is_kept(tmp_path, folder):
    baked = models_caption.tagger(tmp_path / "baked", batch=2)
    images = [WHITE, Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    assert tagger(baked).caption(images) == tagger(folder).caption(images)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    other = models_caption.tagger(tmp_path / "other", tags=4)
    with pytest.raises(UserError, match="model.onnx knows 4 tags, and selected_tags.csv lists 6; take both"):
        tagger(other)
    (other / "selected_tags.csv").unlink()
    with pytest.raises(UserError, match="but no selected_tags.csv; download both"):
        tagger(other)


def test_a_list_of_another_shape_and_a_torn_model_are_refused(tmp_path, folder):
    broken = models_caption.tagger(tmp_path)
    with open(broken / "selected_tags.csv", "w", newline="") as file:
        csv.writer(file).writerows([["tag"], ["sky"]])
    with pytest.raises(UserError, match="not a list of tags with the columns name and category"):
        tagger(broken)
    models_caption.tagger(tmp_path)
    (broken / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:60])
    with pytest.raises(UserError, match="model.onnx: cannot be loaded"):
        tagger(broken)
