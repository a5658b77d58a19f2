"""New text joins the old as a person would write it: prefix once, no tag twice, sentences apart."""

import pytest

from trainer.caption.wording import propose, with_prefix, without


@pytest.mark.parametrize(("before", "said", "mode", "tags", "after"), [
    ("", "a red circle", "missing", False, "a red circle"),
    ("old", "a red circle", "replace", False, "a red circle"),
    ("A dog.", "It runs", "append", False, "A dog. It runs"),
    ("a dog", "it runs", "append", False, "a dog, it runs"),
    ("first line\nsecond", "third", "append", False, "first line\nsecond, third"),
    ("red hair, sky", "blue eyes, Red_Hair", "append", True, "red hair, sky, blue eyes"),
    ("red hair,", "sky", "append", True, "red hair, sky"),
    ("", "sky", "append", True, "sky"),
    ("", "many   words\nin lines ", "replace", False, "many words in lines"),
])
def test_what_is_proposed(before, said, mode, tags, after):
    assert propose(before, said, mode=mode, prefix="", tags=tags) == after


@pytest.mark.parametrize(("text", "prefix", "after"), [
    ("a dog", "mydog", "mydog, a dog"),
    ("a dog", "mydog, ", "mydog, a dog"),
    ("a dog", "photo of mydog:", "photo of mydog: a dog"),
    ("mydog, a dog", "mydog", "mydog, a dog"),
    ("", "mydog", "mydog"),
    ("a dog", "  ", "a dog"),
])
def test_a_prefix_stands_in_front_once(text, prefix, after):
    assert with_prefix(text, prefix) == after


def test_a_prefix_goes_before_the_old_text_too():
    assert propose("a dog", "it runs", mode="append", prefix="mydog", tags=False) == "mydog, a dog, it runs"


def test_the_blacklist_knows_blanks_underscores_and_case_as_one():
    assert without(["long_hair", "1girl", "blue sky"], ["Long Hair", "blue_sky"]) == ["1girl"]
