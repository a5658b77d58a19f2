"""Bulk operations do what they say to one text, and leave everything else of it as it is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.datasets.operations import parse
from trainer.errors import UserError


def run(text, counts=None, /, **operation):
    return parse(operation).editor(counts or {})(text)


def replace(text, find, by, **options):
    return run(text, kind="replace", find=find, replace=by, **options)


@pytest.mark.parametrize(("text", "find", "by", "options", "expected", "hits"), [
    ("a cat, Cat", "cat", "dog", {}, "a dog, dog", 2),
    ("a cat, Cat", "cat", "dog", {"case": True}, "a dog, Cat", 1),
    ("1.5 or 1x5", "1.5", r"\1", {}, r"\1 or 1x5", 1),  # plain text is no expression, on either side
    ("cat, cathedral ,Cat\ncat", "cat", "dog", {"mode": "tag"}, "dog, cathedral ,dog\ndog", 3),
    ("cat, red, cat", "cat", "", {"mode": "tag"}, "red", 2),
    ("red, cat\nblue", "blue", "", {"mode": "tag"}, "red, cat", 1),
    ("Cat, cat", "cat", "dog", {"mode": "tag", "case": True}, "Cat, dog", 1),
    ("a-b, c-d", r"(\w)-(\w)", r"\2-\1", {"mode": "regex"}, "b-a, d-c", 2),
    ("one\ntwo", r"^t", "T", {"mode": "regex"}, "one\ntwo", 0),
    ("one\ntwo", r"(?m)^t", "T", {"mode": "regex"}, "one\nTwo", 1),
    ("Ä ä", "ä", "o", {}, "o o", 2),
])
def test_find_and_replace(text, find, by, options, expected, hits):
    assert replace(text, find, by, **options) == (expected, hits)


@pytest.mark.parametrize(("find", "by", "words"), [
    ("(", "", r"the expression \"\(\" is not valid"), ("a", r"\9", "the replacement .* is not valid"),
    ("a", r"\g<no>", "the replacement .* is not valid"), ("", "x", "find: is empty")])
def test_an_expression_that_is_none_is_told(find, by, words):
    with pytest.raises(UserError, match=words):
        replace("aaa", find, by, mode="regex")


def test_an_expression_that_would_take_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr("app.datasets.operations.PATIENCE", 0.3)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"takes too long .* nested repeats"):
        replace("a" * 5000 + "!", r"(a|aa)+$", "x", mode="regex")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("text", "options", "expected"), [
    ("a cat", {}, "sks, a cat"), ("a cat", {"where": "after"}, "a cat, sks"), ("", {}, "sks"),
    ("\n a cat\n", {"where": "after", "joiner": " "}, "\n a cat sks\n"), ("a SKS cat", {}, "a SKS cat"),
    ("a sks cat", {"skip_present": False}, "sks, a sks cat"), ("asks", {}, "sks, asks")])
def test_adding(text, options, expected):
    assert run(text, kind="add", text="sks", **options).text == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("a, Red ,b", "a,b"), ("red, a", "a"), ("a, red", "a"), ("red", ""), ("a , b", "a , b"),
    ("reddish, a", "reddish, a"), ("one, red\nred\ntwo\n", "one\ntwo\n"), ("  red, a", " a")])
def test_removing_tags_takes_their_comma_and_nothing_else(text, expected):
    assert run(text, kind="remove_tags", tags=["RED"]).text == expected


def test_renaming_a_tag_leaves_no_second_one():
    assert run("kitty , red, cat\nKitty", kind="rename_tag", tag="kitty", to="cat") == ("cat , red", 2)
    assert run("dog, dog", kind="rename_tag", tag="kitty", to="cat") == ("dog, dog", 0)


def test_sorting_by_alphabet_and_by_frequency_line_by_line():
    assert run("c, B ,a\nz, y", kind="sort_tags").text == "a, B, c\ny, z"
    assert run("sks, c, a", kind="sort_tags", keep=1).text == "sks, a, c"
    assert run("a, b, c", {"c": 3, "b": 1, "a": 1}, kind="sort_tags", order="frequency").text == "c, a, b"
    assert run("a ,b\n", kind="sort_tags") == ("a ,b\n", 0)


def test_repeated_tags_go_and_the_first_stays():
    assert run("Red, a, red , b\nred, c", kind="remove_duplicates") == ("Red, a, b\nc", 2)


@pytest.mark.parametrize(("text", "old", "expected"), [
    ("a cat", "", "sks, a cat"), ("photo of SKS", "", "photo of SKS"), ("", "", "sks"),
    ("\na cat\n", "", "\nsks, a cat\n"),
    ("photo of Ohwx cat", "ohwx", "photo of sks cat"), ("ohwx, sks, cat", "ohwx", "sks, cat"),
    ("ohwxy cat", "ohwx", "sks, ohwxy cat")])
def test_setting_the_trigger_word(text, old, expected):
    assert run(text, kind="trigger", word="sks", old=old).text == expected


@pytest.mark.parametrize(("text", "old", "new", "expected"), [
    ("a; b ;c", ";", ",", "a, b, c"), ("a, b", ",", "\n", "a\nb"), ("a\nb\n", "\n", ",", "a, b\n"),
    ("a b", ";", ",", "a b"),
    ("a_b", "_", " ", "a b")])
def test_changing_the_separator(text, old, new, expected):
    assert run(text, kind="separator", old=old, new=new).text == expected


@pytest.mark.parametrize("data", [
    None, {}, {"kind": "none"}, {"kind": "add", "text": ""}, {"kind": "add", "text": 3},
    {"kind": "remove_tags", "tags": []},
    {"kind": "remove_duplicates", "more": 1}, {"kind": "sort_tags", "order": "size"}])
def test_what_is_no_operation_is_a_plain_message(data):
    with pytest.raises(UserError) as error:
        parse(data)
    assert "pydantic" not in str(error.value) and len(str(error.value)) < 300


TAG_WORK = [{"kind": "remove_tags", "tags": ["zzz"]}, {"kind": "rename_tag", "tag": "zzz", "to": "b"},
            {"kind": "replace", "find": "zzz", "replace": "", "mode": "tag"}]


@given(text=st.text("ab ,\n\t", max_size=30), operation=st.sampled_from(TAG_WORK))
def test_a_caption_without_the_tag_keeps_every_character(text, operation):
    assert run(text, **operation) == (text, 0)


@given(tags=st.lists(st.sampled_from(["a", "b", "zzz"]), max_size=8), gap=st.sampled_from([",", ", ", " ,"]))
def test_all_other_tags_stay_in_their_order(tags, gap):
    result = run(gap.join(tags), kind="remove_tags", tags=["zzz"]).text
    assert [tag.strip() for tag in result.split(",") if tag.strip()] == [tag for tag in tags if tag != "zzz"]
