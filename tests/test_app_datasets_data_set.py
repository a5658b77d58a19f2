"""A data set in the app: no lost edit, no lost file, no changed picture; every change can be undone."""

import base64
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from app.datasets import arrange, bulk
from app.datasets.library import Library
from app.datasets.operations import parse
from tests.data_sets import card, draw, image_hashes, tree, wait_for, wait_until_known
from trainer.data import dataset
from trainer.errors import UserError


def names(answer):
    return [card["name"] for card in answer["cards"]]


def mask_of(size):
    packed = BytesIO()
    Image.new("L", size, 255).save(packed, "PNG")
    return packed.getvalue()


def test_a_page_of_cards_tells_captions_whole_with_their_versions(cats):
    page = cats.list_images(count=2)
    assert names(page) == ["5_more/d.png", "5_more/e.jpg"] and page["total"] == 5
    assert page["names"] == ["5_more/d.png", "5_more/e.jpg", "a.png", "b.png", "c.png"]
    assert names(cats.list_images(start=2)) == ["a.png", "b.png", "c.png"]
    a, c = card(cats, "a.png"), card(cats, "c.png")
    assert a["caption"] == "red, cat\nsecond line\n"
    assert a["version"] == hashlib.sha256(b"red, cat\nsecond line\n").hexdigest()[:16] and c["version"] == "none"
    assert (a["repeats"], card(cats, "5_more/d.png")["repeats"]) == (1, 5)


def test_the_overview_of_a_set_counts_and_follows_changes_from_outside(cats):
    before = cats.info()
    assert (before["images"], before["captioned"], before["excluded"]) == (5, 4, 0)
    assert before["folders"] == [{"name": "5_more", "images": 2, "repeats": 5}, {"name": "", "images": 3, "repeats": 1}]
    draw(cats.root / "new.png", caption="new")
    cats.index.refresh(at_once=True)
    after = cats.info()
    assert after["images"] == 6 and after["tag"] != before["tag"]


def test_a_caption_is_saved_whole_and_only_when_it_changed(cats):
    path = cats.root / "a.txt"
    seen, before = card(cats, "a.png"), path.stat()
    assert cats.save_caption("a.png", seen["caption"], seen["version"])["version"] == seen["version"]
    assert path.stat().st_mtime_ns == before.st_mtime_ns and cats.info()["undo"] is None
    saved = cats.save_caption("a.png", " new\ntext \n\n", seen["version"])
    assert saved["saved"] and path.read_bytes() == b" new\ntext \n\n"
    assert card(cats, "a.png")["version"] == saved["version"]
    assert cats.save_caption("c.png", "first", "none")["saved"] and (cats.root / "c.txt").read_bytes() == b"first"
    assert cats.undo()["done"] == "edit the caption of c.png" and not (cats.root / "c.txt").exists()
    cats.undo()
    assert path.read_bytes() == b"red, cat\nsecond line\n" and card(cats, "a.png")["caption"] == seen["caption"]


def test_two_tabs_lose_no_edit(cats):
    seen = card(cats, "b.png")["version"]
    first = cats.save_caption("b.png", "from the first tab", seen)
    second = cats.save_caption("b.png", "from the second tab", seen)
    assert not second["saved"]
    assert second["conflict"] == {"text": "from the first tab", "version": first["version"]}
    assert (cats.root / "b.txt").read_bytes() == b"from the first tab"
    assert cats.save_caption("b.png", "from the first tab", seen)["saved"]  # both wrote the same
    assert cats.save_caption("b.png", "both", second["conflict"]["version"])["saved"]


def test_an_edit_from_outside_is_not_overwritten_and_shown(cats):
    seen = card(cats, "b.png")["version"]
    (cats.root / "b.txt").write_bytes(b"by an editor")
    answer = cats.save_caption("b.png", "mine", seen)
    assert answer["conflict"]["text"] == "by an editor" == card(cats, "b.png")["caption"]


def test_a_caption_that_cannot_be_read_is_never_overwritten(cats):
    (cats.root / "b.txt").write_bytes("Mädchen".encode("latin-1"))
    cats.index.refresh(at_once=True)
    assert "not UTF-8" in card(cats, "b.png")["fault"] and card(cats, "b.png")["caption"] == ""
    with pytest.raises(UserError, match="b.txt: the caption is not UTF-8 text"):
        cats.save_caption("b.png", "mine", card(cats, "b.png")["version"])
    answer = cats.apply_captions("automatic captions", {"b.png": "x", "c.png": "y"})
    assert answer["changed"] == 1 and answer["skipped"][0][0] == "b.png"
    assert (cats.root / "b.txt").read_bytes() == "Mädchen".encode("latin-1")


def test_many_captions_are_one_entry_and_what_changed_meanwhile_is_skipped(cats):
    old = {name: card(cats, name)["caption"] for name in ("a.png", "b.png")}
    (cats.root / "b.txt").write_bytes(b"edited meanwhile")
    answer = cats.apply_captions("automatic captions", {"a.png": "new a", "b.png": "new b", "c.png": "new c"},
                                 before=old)
    assert answer["changed"] == 2 and answer["skipped"] == [("b.png", "its caption was changed since")]
    assert cats.undo()["done"] == "automatic captions"
    assert (cats.root / "a.txt").read_bytes() == b"red, cat\nsecond line\n" and not (cats.root / "c.txt").exists()


def test_excluded_images_stay_where_they_are_and_training_passes_them_over(cats):
    old = tree(cats.root)
    cats.exclude(["a.png", "5_more/d.png"])
    assert cats.info()["excluded"] == 2 and card(cats, "a.png")["excluded"]
    assert [item.path.name for item in dataset.scan([cats.root]).items] == ["e.jpg", "b.png", "c.png"]
    assert [item.path.name for item in dataset.scan([cats.root / "5_more"]).items] == ["e.jpg"]
    cats.exclude(["a.png"], excluded=False)
    assert not (cats.root / ".excluded").exists() and cats.info()["excluded"] == 1
    cats.undo(), cats.undo()
    assert tree(cats.root) == old


def test_deleted_images_lie_in_the_trash_with_their_captions_until_it_is_emptied(cats):
    old, hashes = tree(cats.root), image_hashes(cats.root)
    cats.exclude(["5_more/d.png"])
    cats.delete(["5_more/d.png", "a.png"])
    assert sorted(tree(cats.root)) == ["5_more/e.jpg", "5_more/e.txt", "b.png", "b.txt", "c.png"]
    assert image_hashes(cats.root) == hashes
    told = cats.trash()
    assert sorted(file["name"] for file in told["files"]) == ["5_more/d.png", "5_more/d.txt", "a.png", "a.txt"]
    cats.restore([file["key"] for file in told["files"] if file["name"].startswith("a.")])
    assert (cats.root / "a.txt").exists() and len(cats.trash()["files"]) == 2
    cats.undo(), cats.undo(), cats.undo()
    assert tree(cats.root) == old and cats.trash()["files"] == []
    cats.delete(["a.png"])
    assert cats.empty_trash()["removed"] == 2
    refused = cats.undo()
    assert [name for name, _ in refused["conflict"]["files"]] and not (cats.root / "a.png").exists()
    assert cats.undo(skip_changed=True)["done"] == "delete 1 image"


def test_an_excluded_image_comes_back_from_the_trash_excluded(cats):
    old = tree(cats.root)
    cats.exclude(["5_more/d.png", "a.png", "b.png"])
    excluded = tree(cats.root)
    cats.delete(["5_more/d.png", "a.png", "c.png"])
    files = {file["name"]: file["key"] for file in cats.trash()["files"]}
    assert sorted(files) == ["5_more/d.png", "5_more/d.txt", "a.png", "a.txt", "c.png"]
    trashed = {path: path.read_bytes() for path in cats.root.rglob("*") if path.is_file() and "trash" in path.parts}
    cats.restore([files[name] for name in ("5_more/d.png", "a.png", "a.txt")])
    assert cats.info()["excluded"] == 3 and cats.info()["undo"] == "restore 3 files"
    cats.restore([files["5_more/d.txt"], files["c.png"]])
    assert tree(cats.root) == excluded
    assert [path for path in (cats.root / ".studio" / "trash").rglob("*")] == []  # no list is left there
    cats.undo(), cats.undo()
    assert cats.info()["excluded"] == 1
    assert trashed == {path: path.read_bytes() for path in trashed}
    cats.undo()
    assert tree(cats.root) == excluded and cats.trash()["files"] == []
    cats.undo()
    assert tree(cats.root) == old


def test_excluded_images_are_excluded_in_the_other_data_set_too(cats, library):
    other = library.open(library.create("other")["id"])
    draw(other.root / "a.png", seed=91)
    before = tree(other.root)
    cats.exclude(["a.png", "5_more/d.png"])
    cats.send(["a.png", "b.png", "5_more/d.png"], other)
    assert {name: record.excluded for name, record in other.index.records.items()} == {
        "a.png": False, "a-2.png": True, "b.png": False, "5_more/d.png": True}
    other.undo()
    assert tree(other.root) == before
    other.redo()
    assert other.info()["excluded"] == 2


def test_restoring_onto_a_new_file_is_refused(cats):
    cats.delete(["a.png"])
    draw(cats.root / "a.png", seed=9)
    with pytest.raises(UserError, match="there is a a.png again"):
        cats.restore([file["key"] for file in cats.trash()["files"]])
    with pytest.raises(UserError, match="no longer in the trash"):
        cats.restore(["../../b.png"])


def test_of_two_trashed_files_of_one_name_one_can_be_restored(cats):
    cats.delete(["c.png"])
    draw(cats.root / "c.png", seed=9)
    cats.index.refresh(at_once=True)
    cats.delete(["c.png"])
    keys = [file["key"] for file in cats.trash()["files"]]
    with pytest.raises(UserError, match="two of the files were called c.png; choose one of them"):
        cats.restore(keys)
    assert len(cats.trash()["files"]) == 2 and not (cats.root / "c.png").exists()
    cats.restore([keys[0], keys[0]])
    assert len(cats.trash()["files"]) == 1 and cats.undo()["done"] == "restore 1 file"


def test_images_move_between_folders_with_all_that_is_theirs(cats):
    old = tree(cats.root)
    cats.save_mask("a.png", mask_of((32, 24)))
    cats.exclude(["a.png"])
    cats.move(["a.png", "5_more/d.png"], "10_new/deep")
    there = [name for name in tree(cats.root) if name.startswith("10_new")]
    assert there == [f"10_new/deep/{name}" for name in
                     (".excluded", "a-masklabel.png", "a.png", "a.txt", "d.png", "d.txt")]
    assert card(cats, "10_new/deep/a.png")["excluded"] and card(cats, "10_new/deep/a.png")["repeats"] == 10
    for _ in range(3):
        cats.undo()
    assert tree(cats.root) == old and not (cats.root / "10_new").exists()


@pytest.mark.parametrize("folder", ["..", "../out", "/tmp", ".hidden", "a/../..", "a:b", "a\\b", "con", "b.png", " x"])
def test_a_folder_that_cannot_be_one_is_refused(cats, folder):
    old = tree(cats.root)
    with pytest.raises(UserError):
        cats.move(["a.png"], folder)
    assert tree(cats.root) == old


def test_nothing_is_overwritten_by_a_move(cats):
    draw(cats.root / "5_more" / "a.png", seed=8, caption="other")
    cats.index.refresh(at_once=True)
    old = tree(cats.root)
    with pytest.raises(UserError, match="a.png is there already"):
        cats.move(["a.png"], "5_more")
    with pytest.raises(UserError, match="two of the images would be called new/a.png"):
        cats.move(["a.png", "5_more/a.png"], "new")
    assert tree(cats.root) == old


def test_thousands_of_images_are_moved_at_once(cats):
    some = cats.records(["a.png"])[0]
    many = [replace(some, name=f"{i}.png", mask=True) for i in range(5000)]
    began = time.monotonic()
    assert len(arrange.into_folder(cats.root, many, many, "new")) == 15_000
    assert time.monotonic() - began < 4  # the journal is held meanwhile


def test_a_caption_and_a_mask_that_two_images_share_stay_with_the_other(cats):
    draw(cats.root / "a.jpg", seed=7)
    cats.index.refresh(at_once=True)
    cats.save_mask("a.png", mask_of((32, 24)))
    cats.move(["a.png"], "moved")
    assert card(cats, "a.jpg")["mask"] and not card(cats, "moved/a.png")["mask"]
    cats.undo()
    cats.delete(["a.png"])
    assert card(cats, "a.jpg")["caption"] == "red, cat\nsecond line\n" and card(cats, "a.jpg")["mask"]
    cats.delete(["a.jpg"])
    assert not (cats.root / "a.txt").exists() and not (cats.root / "a-masklabel.png").exists()


def test_images_are_copied_or_moved_to_another_data_set(cats, library):
    other = library.open(library.create("other")["id"])
    old, hashes = tree(cats.root), image_hashes(cats.root)
    assert cats.send(["a.png", "5_more/d.png"], other)["sent"] == 2
    assert tree(cats.root) == old
    assert {name: data for name, data in old.items() if "a." in name or "d." in name} == tree(other.root)
    wait_until_known(other)
    again = cats.send(["a.png", "b.png"], other, keep=False)
    assert (again["sent"], again["refused"]) == (1, [("a.png", "is the same picture as a.png")])
    assert (cats.root / "a.png").exists() and not (cats.root / "b.png").exists()
    assert (other.root / "b.txt").read_bytes() == b"blue, cat"
    assert set(image_hashes(cats.root)) == set(hashes)
    assert cats.undo()["done"].endswith("to other") and tree(cats.root) == old
    while other.undo()["done"]:
        pass
    assert tree(other.root) == {}
    with pytest.raises(UserError, match="that is the same data set"):
        cats.send(["a.png"], cats)


def test_a_copy_that_is_refused_takes_no_caption_along_to_another_image(cats, library):
    other = library.open(library.create("other")["id"])
    draw(other.root / "a.png", seed=90, caption="theirs")
    (other.root / "z.png").write_bytes((cats.root / "a.png").read_bytes())
    other.index.refresh(at_once=True)
    wait_until_known(other)
    old = tree(other.root)
    assert cats.send(["a.png"], other, keep=False)["sent"] == 0
    assert tree(other.root) == old and (cats.root / "a.png").exists()


def test_an_image_moves_with_its_own_caption_or_stays_where_it_was(cats, library):
    other = library.open(library.create("other")["id"])
    for name in ("a_.txt", "b_.txt", "b_-2.txt"):
        (other.root / name).write_text("of a stranger")
    for name in ("a?", "b?"):
        draw(cats.root / f"{name}.png", seed=ord(name[0]), caption=f"of {name}")
    cats.index.refresh(at_once=True)
    answer = cats.send(["a?.png", "b?.png"], other, keep=False)
    assert (answer["sent"], answer["refused"]) == (1, [("b?.txt", "there is a b_-2.txt already")])
    assert other.records(["a_-2.png"])[0].caption == "of a?" and not (cats.root / "a?.txt").exists()
    assert (cats.root / "b?.txt").read_text() == "of b?" and (cats.root / "b?.png").exists()


def test_masks_are_checked_written_and_put_away_again(cats):
    wait_until_known(cats)
    for png, words in [(b"no picture", "is not a PNG"), (mask_of((5, 5)), "the mask has 5 × 5 pixels")]:
        with pytest.raises(UserError, match=words):
            cats.save_mask("a.png", png)
    cats.save_mask("a.png", mask_of((32, 24)))
    assert base64.b64decode(cats.mask("a.png")["png"]) == mask_of((32, 24)) and card(cats, "a.png")["mask"]
    cats.save_mask("a.png", None)
    assert cats.mask("a.png")["png"] == "" and not card(cats, "a.png")["mask"]
    cats.undo()
    assert (cats.root / "a-masklabel.png").read_bytes() == mask_of((32, 24))


@pytest.mark.parametrize("name", ["none.png", "../cats/a.png", "a.txt", "", "/etc/passwd", ".studio/lock"])
def test_only_images_of_the_set_can_be_named(cats, name):
    for call in (lambda: cats.thumbs([name]), lambda: cats.save_caption(name, "x", "none"), lambda: cats.large(name),
                 lambda: cats.delete([name]), lambda: cats.mask(name), lambda: cats.exclude([name])):
        with pytest.raises(UserError, match="not in this data set any more"):
            call()


def test_thumbnails_and_large_views_are_upright_and_small(cats):
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(cats.root / "big.jpg", size=(1800, 900), exif=exif)
    cats.index.refresh(at_once=True)
    asked = [card["name"] for card in cats.list_images()["cards"]]
    wait_for(lambda: all(cats.thumbs(asked)["thumbs"].values()))
    thumb = Image.open(cats.thumbs(["big.jpg"])["thumbs"]["big.jpg"])
    assert thumb.size == (160, 320) and os.path.getsize(cats.thumbs(["big.jpg"])["thumbs"]["big.jpg"]) < 30_000
    cats.index.records["big.jpg"].facts = None  # as of a record that a refresh replaces while the view is made
    large = cats.large("big.jpg")
    assert Image.open(large["path"]).size == (640, 1280) and (large["width"], large["height"]) == (900, 1800)
    assert card(cats, "big.jpg")["thumb"] and card(cats, "big.jpg")["width"] == 900


def test_many_at_once_lose_no_edit(cats, library):
    """Several threads of two apps on the same captions: whoever is told "saved" is in the journal, in order."""
    old, other = tree(cats.root), Library(library.places).open(cats.id)
    saved = []

    def edit(data_set, writer):
        version = card(data_set, "b.png")["version"]
        for i in range(15):
            text = f"writer {writer}, edit {i}"
            answer = data_set.save_caption("b.png", text, version)
            version = answer["version"] if answer["saved"] else answer["conflict"]["version"]
            if answer["saved"]:
                saved.append(text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(edit, [cats, other, cats, other], range(4)))
    assert len(saved) >= 4 and len(cats.journal._made) <= len(saved)
    cats.index.refresh(at_once=True)
    undone = []
    while cats.undo()["done"]:
        undone.append((cats.root / "b.txt").read_text())
    assert set(undone[:-1]) <= set(saved) and len(undone) == len(saved) and tree(cats.root) == old


def test_no_operation_changes_a_byte_of_an_image(cats, library, tmp_path):
    draw(tmp_path / "up.png", seed=20)
    old, before = tree(cats.root), set(image_hashes(cats.root))
    others = {hashlib.sha256(data).hexdigest() for data in ((tmp_path / "up.png").read_bytes(), mask_of((32, 24)))}
    every = [card["name"] for card in cats.list_images()["cards"]]
    for operation in ({"kind": "add", "text": "x"}, {"kind": "sort_tags"}, {"kind": "trigger", "word": "sks"}):
        token = bulk.preview(cats, parse(operation))["token"]
        bulk.apply(cats, parse(operation), None, token)
    cats.save_caption("c.png", "text", card(cats, "c.png")["version"])
    cats.save_mask("a.png", mask_of((32, 24)))
    cats.exclude(every)
    cats.move(["a.png"], "moved")
    cats.add_files([("up.png", tmp_path / "up.png")])
    cats.send(["b.png"], library.open(library.create("other")["id"]))
    cats.delete(["c.png", "moved/a.png"])
    cats.restore([file["key"] for file in cats.trash()["files"]][:1])
    assert before < set(image_hashes(cats.root)) <= before | others
    for turn in (cats.undo, cats.redo, cats.undo):
        while turn()["done"]:
            pass
        assert before <= set(image_hashes(cats.root)) <= before | others
    assert tree(cats.root) == old
