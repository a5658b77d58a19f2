"""Captions: nothing is lost on the way from the file to the step, and nothing is written without need."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import captions
from trainer.errors import UserError

PLAIN = {"trigger": "", "shuffle_tags": False, "keep_tags": 1}
TAGS = st.lists(st.text("abcde é", min_size=1).map(str.strip).filter(bool), max_size=6)


def test_the_sidecar_keeps_dots_in_the_name():
    assert captions.sidecar(Path("a/photo.v2.PNG")) == Path("a/photo.v2.txt")


def test_a_missing_caption_is_empty(tmp_path):
    assert captions.read(tmp_path / "none.txt") == ""


def test_every_line_is_read_and_the_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff  first line\r\nzweite Zeile: Ü \n\n".encode())
    assert captions.read(path) == "first line\nzweite Zeile: Ü"


@pytest.mark.parametrize("data", ["Mädchen".encode("latin-1"), "a cat".encode("utf-16"), "a cat".encode("utf-16-le")])
def test_other_encodings_are_refused_by_name_and_never_overwritten(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    for act in (lambda: captions.read(path), lambda: captions.write(path, "new")):
        with pytest.raises(UserError, match="a.txt: the caption is not UTF-8 text .*; save it as UTF-8"):
            act()
    assert path.read_bytes() == data


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")))
def test_what_is_written_is_read_back(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("c") / "a.txt"
    captions.write(path, text)
    assert captions.read(path) == text.replace("\r\n", "\n").replace("\r", "\n").strip()


def test_an_unchanged_caption_is_not_touched(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    before = path.stat()
    assert captions.write(path, "one\ntwo") is False
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert captions.write(tmp_path / "b.txt", "") is False and not (tmp_path / "b.txt").exists()
    assert captions.write(path, "one\nthree") is True and path.read_bytes() == b"one\nthree"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_tags_are_trimmed_and_empty_ones_dropped():
    assert captions.split_tags(" a cat,, red , \n") == ["a cat", "red"]
    assert captions.join_tags(["a cat", "red"]) == "a cat, red"


@pytest.mark.parametrize(("text", "expected"), [
    ("a dog", "sks, a dog"), ("", "sks"), ("photo of SKS dog", "photo of SKS dog"), ("sksy dog", "sks, sksy dog"),
    ("he asks", "sks, he asks")])
def test_the_trigger_word_is_put_where_it_is_missing_as_a_whole_word(text, expected):
    plain = PLAIN | {"trigger": "sks"}
    assert captions.training_caption(text, **plain, rng=random.Random(0)) == expected


def test_without_shuffling_the_text_stays_as_it_is():
    text = "a cat,  on a mat,\nsecond line"
    assert captions.training_caption(text, **PLAIN, rng=random.Random(0)) == text


@given(tags=TAGS, keep=st.integers(0, 4), seed=st.integers(0, 99))
def test_shuffling_keeps_the_first_tags_and_loses_none(tags, keep, seed):
    result = captions.training_caption(", ".join(tags), trigger="", shuffle_tags=True, keep_tags=keep,
                                       rng=random.Random(seed))
    assert captions.split_tags(result)[:keep] == tags[:keep]
    assert sorted(captions.split_tags(result)) == sorted(tags)


def test_the_trigger_word_put_in_front_is_a_kept_tag():
    found = captions.variants("a, b, c", trigger="sks", shuffle_tags=True, keep_tags=1, count=6, seed=0)
    assert len(set(found)) == 6 and all(text.startswith("sks, ") for text in found)


def test_variants_are_distinct_as_far_as_the_tags_allow_and_then_repeat():
    options = {"trigger": "", "shuffle_tags": True, "keep_tags": 0}
    assert len(set(captions.variants("a, b, c, d", **options, count=24, seed=1))) == 24
    assert sorted(captions.variants("a, b", **options, count=4, seed=1)) == ["a, b", "a, b", "b, a", "b, a"]
    assert len(captions.variants("a, a, a, a, b", **options, count=100, seed=1)) == 100
    assert captions.variants("a cat", **PLAIN, count=3, seed=1) == ["a cat"] * 3


def test_variants_are_a_function_of_text_and_seed():
    options = {"trigger": "", "shuffle_tags": True, "keep_tags": 0, "count": 4}
    text = "a, b, c, d, e, f"
    assert captions.variants(text, **options, seed=3) == captions.variants(text, **options, seed=3)
    assert captions.variants(text, **options, seed=3) != captions.variants(text, **options, seed=4)


@pytest.mark.parametrize("data", [b"one\r\ntwo\r\n ", b"\xef\xbb\xbf one\n\n", b"old\rmac\r", b"", "Ü, é\n".encode()])
def test_a_whole_text_comes_back_byte_for_byte(data):
    assert captions.encode(captions.decode(data, Path("a.txt")), like=data) == data


@pytest.mark.parametrize(("like", "expected"), [
    (b"", b"a\nb"), (b"x\n", b"a\nb"), (b"x\r\ny\r\n", b"a\r\nb"), (b"x\r\ny\nz\n", b"a\nb"), (b"x\ry", b"a\rb"),
    (b"\xef\xbb\xbfx", b"\xef\xbb\xbfa\nb")])
def test_a_new_text_has_the_line_ends_and_the_mark_that_the_file_had(like, expected):
    assert captions.encode("a\r\nb", like=like) == expected


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_what_no_caption_can_hold_is_refused(text):
    with pytest.raises(UserError, match="take it out"):
        captions.encode(text)


def test_a_version_tells_contents_apart_and_none_from_empty():
    assert len({captions.version(data) for data in (None, b"", b"a", b"a\n")}) == 4
    assert captions.version(b"a") == captions.version(b"a")
