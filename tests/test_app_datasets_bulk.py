"""Bulk changes are shown before they are made, and what was shown is what is made."""

import pytest

from app.datasets import bulk
from app.datasets.diff import spans
from app.datasets.operations import parse
from tests.data_sets import draw, tree
from trainer.errors import UserError

RED = parse({"kind": "replace", "find": "red", "replace": "green"})


def test_a_preview_counts_shows_pages_and_writes_nothing(cats):
    old = tree(cats.root)
    shown = bulk.preview(cats, RED, count=2)
    assert (shown["changed"], shown["of"], shown["hits"]) == (3, 5, 3)
    assert [change["name"] for change in shown["changes"]] == ["5_more/d.png", "5_more/e.jpg"]
    assert shown["changes"][0]["spans"] == [("-", "red"), ("+", "green"), ("=", ", dog")]
    assert [change["name"] for change in bulk.preview(cats, RED, start=2)["changes"]] == ["a.png"]
    assert tree(cats.root) == old and cats.info()["undo"] is None


def test_what_was_shown_is_made_as_one_entry_that_undo_takes_back(cats):
    (cats.root / "b.txt").write_bytes(b"\xef\xbb\xbfred, cat\r\n")
    cats.index.refresh(at_once=True)
    old = tree(cats.root)
    answer = bulk.apply(cats, RED, None, bulk.preview(cats, RED)["token"])
    assert answer["changed"] == 4 and answer["undo"] == 'replace "red" by "green"'
    assert tree(cats.root)["b.txt"] == b"\xef\xbb\xbfgreen, cat\r\n"
    assert tree(cats.root)["a.txt"] == b"green, cat\nsecond line\n"
    cats.undo()
    assert tree(cats.root) == old
    cats.redo()
    assert tree(cats.root)["5_more/e.txt"] == b"green, bird, masterpiece"


def test_only_the_chosen_images_change(cats):
    token = bulk.preview(cats, RED, ["a.png", "b.png"])["token"]
    assert bulk.apply(cats, RED, ["a.png", "b.png"], token)["changed"] == 1
    assert tree(cats.root)["5_more/d.txt"] == b"red, dog"


def test_captions_that_changed_since_the_preview_are_shown_again_first(cats):
    token = bulk.preview(cats, RED)["token"]
    (cats.root / "b.txt").write_bytes(b"red by an editor")
    old = tree(cats.root)
    assert bulk.apply(cats, RED, None, token)["stale"] and tree(cats.root) == old
    other = parse({"kind": "replace", "find": "red", "replace": "blue"})
    assert bulk.apply(cats, other, None, bulk.preview(cats, RED)["token"])["stale"]
    assert bulk.apply(cats, RED, None, bulk.preview(cats, RED)["token"])["changed"] == 4


def test_nothing_to_change_is_no_entry(cats):
    none = parse({"kind": "replace", "find": "nothing like it"})
    assert bulk.apply(cats, none, None, bulk.preview(cats, none)["token"])["changed"] == 0
    assert cats.info()["undo"] is None


def test_a_caption_of_two_images_changes_once_and_a_broken_one_not_at_all(cats):
    draw(cats.root / "a.jpg", seed=9)
    (cats.root / "b.txt").write_bytes(b"red M\xe4dchen")
    add = parse({"kind": "add", "text": "x", "skip_present": False})
    cats.index.refresh(at_once=True)
    shown = bulk.preview(cats, add, ["a.png", "a.jpg", "b.png"])
    assert (shown["changed"], shown["of"]) == (1, 1)
    bulk.apply(cats, add, ["a.png", "a.jpg", "b.png"], shown["token"])
    assert tree(cats.root)["a.txt"] == b"x, red, cat\nsecond line\n" and tree(cats.root)["b.txt"] == b"red M\xe4dchen"


def test_sorting_by_frequency_knows_the_whole_set(cats):
    operation = parse({"kind": "sort_tags", "order": "frequency"})
    (cats.root / "5_more" / "e.txt").write_bytes(b"bird, RED")
    cats.index.refresh(at_once=True)
    first, change = bulk.preview(cats, operation, ["5_more/e.jpg", "b.png"])["changes"]
    assert (first["before"], first["after"]) == ("bird, RED", "RED, bird")
    assert (change["before"], change["after"]) == ("blue, cat", "cat, blue")


def test_captions_do_not_grow_without_end(cats):
    (cats.root / "b.txt").write_bytes(b"a" * 20_000)
    cats.index.refresh(at_once=True)
    with pytest.raises(UserError, match="b.png: its caption would have 200000000 characters"):
        bulk.preview(cats, parse({"kind": "replace", "find": "a", "replace": "b" * 10_000}))


@pytest.mark.parametrize(("before", "after"), [
    ("a red cat", "a blue cat"), ("", "new"), ("old", ""), ("one\ntwo", "two\nthree"), ("w " * 3000, "v " * 3000)])
def test_the_pieces_of_a_difference_give_both_texts(before, after):
    pieces = spans(before, after)
    assert "".join(text for kind, text in pieces if kind in "=-") == before
    assert "".join(text for kind, text in pieces if kind in "=+") == after
