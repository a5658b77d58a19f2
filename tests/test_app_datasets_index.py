"""The index finds, filters and sorts what the folder holds, and says what it cannot show."""

import os

import pytest

from app.datasets.index import find, tags_of
from tests.data_sets import draw, wait_until_known
from trainer.errors import UserError


def found(data_set, **asked):
    return [record.name for record in find(data_set.records(), **asked)]


@pytest.mark.parametrize(("asked", "expected"), [
    ({"search": "RED"}, ["5_more/d.png", "5_more/e.jpg", "a.png"]), ({"search": "line red"}, ["a.png"]),
    ({"search": "none"}, []), ({"tag": "red"}, ["5_more/d.png", "5_more/e.jpg", "a.png"]), ({"tag": "re"}, []),
    ({"tag": "second line"}, ["a.png"]), ({"filter": "no_caption"}, ["c.png"]),
    ({"filter": "included", "search": "cat"}, ["a.png", "b.png"]), ({"filter": "excluded"}, []),
    ({"sort": "longest", "search": "red"}, ["5_more/e.jpg", "a.png", "5_more/d.png"]),
    ({"sort": "caption"}, ["c.png", "b.png", "5_more/e.jpg", "a.png", "5_more/d.png"])])
def test_captions_are_searched_filtered_and_sorted(cats, asked, expected):
    assert found(cats, **asked) == expected


def test_pixels_are_filtered_and_sorted_once_they_are_known(cats):
    draw(cats.root / "big.png", size=(600, 500), seed=11)
    draw(cats.root / "copy.png", size=(600, 500), seed=11)
    (cats.root / "broken.png").write_bytes(b"no picture")
    cats.index.refresh(at_once=True)
    wait_until_known(cats)
    assert found(cats, filter="too_small", too_small=512) == ["5_more/d.png", "5_more/e.jpg", "a.png", "b.png", "c.png"]
    assert found(cats, filter="duplicate") == ["big.png", "copy.png"]
    assert found(cats, filter="trouble") == ["broken.png"]
    assert found(cats, sort="largest")[:2] == ["big.png", "copy.png"]
    os.utime(cats.root / "c.png", (2e9, 2e9))
    cats.index.refresh(at_once=True)
    assert found(cats, sort="newest")[0] == "c.png"


def test_names_are_in_the_order_of_people(cats):
    for name in ("10.png", "9.png", "B.png"):
        draw(cats.root / name)
    cats.index.refresh(at_once=True)
    assert [name for name in found(cats) if name != "B.png"] == [
        "5_more/d.png", "5_more/e.jpg", "9.png", "10.png", "a.png", "b.png", "c.png"]
    assert found(cats).index("B.png") in (5, 6)


def test_what_cannot_be_shown_is_counted_with_its_reason(cats, tmp_path):
    draw(tmp_path / "secret" / "s.png")
    os.symlink(tmp_path / "secret", cats.root / "linked")
    os.symlink(tmp_path / "secret" / "s.png", cats.root / "link.png")
    os.symlink(cats.root / "none.png", cats.root / "nowhere.png")
    for name in (b"with:colon.png", b"torn\xff.png", b"line\nbreak.png"):
        with open(os.fsencode(cats.root) + b"/" + name, "wb"):
            pass
    cats.index.refresh(at_once=True)
    assert len(found(cats)) == 5
    note = cats.info()["note"]
    assert "1 image not shown: they lie behind a link that leads out of the data set" in note
    assert "1 image not shown: they are links that lead out" in note
    assert "1 image not shown: they are links to nowhere" in note
    assert '3 images not shown: their names hold ":"' in note


def test_a_link_to_a_caption_inside_is_followed_and_one_that_leads_out_is_not_written(cats, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    os.symlink(tmp_path / "secret.txt", cats.root / "c.txt")
    cats.index.refresh(at_once=True)
    with pytest.raises(UserError, match="leads out"):
        cats.save_caption("c.png", "mine", "none")
    assert (tmp_path / "secret.txt").read_text() == "secret"


def test_a_caption_changed_outside_is_read_again(cats):
    (cats.root / "b.txt").write_bytes(b"green, bird")
    cats.index.refresh(at_once=True)
    assert found(cats, search="green") == ["b.png"]
    (cats.root / "b.txt").unlink()
    cats.index.refresh(at_once=True)
    assert found(cats, filter="no_caption") == ["b.png", "c.png"]


def test_a_folder_that_is_gone_is_told(cats):
    cats.root.rename(cats.root.with_name("elsewhere"))
    with pytest.raises(UserError, match="cats is not there any more"):
        cats.index.refresh(at_once=True)


def test_an_enormous_caption_is_left_alone(cats):
    (cats.root / "b.txt").write_bytes(b"x" * 1_000_001)
    cats.index.refresh(at_once=True)
    assert "the caption has 1000001 bytes" in cats.records(["b.png"])[0].fault


def test_tags_are_counted_whatever_their_case_and_shown_as_mostly_written(cats):
    assert cats.tags()["tags"][:2] == [["red", 3], ["cat", 2]] and len(cats.tags()["tags"]) == 7
    assert cats.tags("RE")["tags"] == [["red", 3]] and cats.tags(most=1)["tags"] == [["red", 3]]
    assert tags_of("a, b,\n c ,,") == ["a", "b", "c"]
