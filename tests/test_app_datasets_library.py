"""Data sets are found and made in the workspace and below --root, and nowhere else."""

import os
import time

import pytest

from app.datasets.library import Library
from app.paths import Places
from tests.data_sets import draw, tree
from trainer.errors import UserError


@pytest.fixture
def root(tmp_path, library):
    folder = tmp_path / "pictures"
    draw(folder / "cats" / "a.png", seed=1, caption="a")
    draw(folder / "cats" / "5_more" / "b.png", seed=2)
    draw(folder / "top.png", seed=3)
    (folder / ".hidden").mkdir()
    return folder


def root_id(library):
    [own] = library.list_sets()["roots"]
    return own["id"]


def test_a_new_data_set_is_an_empty_folder_in_the_workspace(library):
    made = library.create("my cats")
    info = library.open(made["id"]).info()
    assert (info["folder"], info["images"]) == ((library.places.datasets / "my cats").as_posix(), 0)
    assert [(row["id"], row["name"], row["own"]) for row in library.list_sets()["sets"]] == [
        (made["id"], "my cats", True)]
    with pytest.raises(UserError, match="already a data set called 'my cats'"):
        library.create("my cats")


@pytest.mark.parametrize("name", [
    "", ".", "..", "../x", "a/b", "/abs", ".hidden", "a:b", "a\\b", "con", "x ", "x" * 300])
def test_a_name_that_cannot_be_one_is_refused(library, name):
    with pytest.raises(UserError):
        library.create(name)
    assert not library.places.datasets.exists() or list(library.places.datasets.iterdir()) == []


def test_folders_below_a_root_can_be_walked_and_opened(library, root):
    top = library.browse(root_id(library))
    assert (top["up"], top["images"], top["folder"]) == (None, 1, root.as_posix())
    [cats] = top["folders"]
    assert (cats["name"], cats["images"]) == ("cats", 1)
    below = library.browse(cats["id"])
    assert below["up"] == top["id"] and [folder["name"] for folder in below["folders"]] == ["5_more"]
    assert library.open(cats["id"]).info()["images"] == 2 and library.open(top["id"]).info()["images"] == 3
    assert library.open(below["folders"][0]["id"]).records()[0].repeats == 5
    assert {row["name"] for row in library.list_sets()["sets"] if not row["own"]} == {"cats", "pictures", "5_more"}


def test_looking_at_a_folder_leaves_nothing_in_it(library, root):
    old = sorted(root.rglob("*"))
    data_set = library.open(library.browse(root_id(library))["folders"][0]["id"])
    data_set.list_images(), data_set.info(), data_set.trash()
    assert sorted(root.rglob("*")) == old


@pytest.mark.parametrize("name", [
    "../workspace", "..", "/etc", "cats/../..", "leak", ".hidden", "none", "top.png", "cats/.studio"])
def test_nothing_outside_a_root_can_be_opened(library, root, name, tmp_path):
    os.symlink(tmp_path, root / "leak")
    (root / "cats" / ".studio").mkdir()
    for call in (library.open, library.browse, lambda id: library.copy_in(id, "copy")):
        with pytest.raises(UserError):
            call(root_id(library) + name)
    assert "leak" not in [folder["name"] for folder in library.browse(root_id(library))["folders"]]


@pytest.mark.parametrize("id", ["", ":", "x", "nokey:cats", "/etc:", "000000000000:cats"])
def test_an_id_that_is_none_is_refused(library, id):
    with pytest.raises(UserError, match="there is no data set"):
        library.open(id)


def test_ids_stay_when_roots_are_added_and_the_app_starts_again(library, root, tmp_path):
    id = library.browse(root_id(library))["folders"][0]["id"]
    (tmp_path / "other").mkdir()
    again = Library(Places(library.places.workspace, (tmp_path / "other", root)))
    assert again.browse(id)["folder"] == (root / "cats").as_posix()


def test_a_folder_is_copied_in_with_all_that_training_reads(library, root):
    (root / "cats" / ".excluded").write_text("a.png\n")
    (root / "cats" / "a-masklabel.png").write_bytes(b"mask")
    (root / "cats" / "notes.md").write_bytes(b"mine")
    old = tree(root)
    made = library.copy_in(library.browse(root_id(library))["folders"][0]["id"], "copy")
    assert made["copied"] == 2 and tree(root) == old
    copied = {name.removeprefix("cats/"): data for name, data in old.items() if name.startswith("cats/")}
    copied.pop("notes.md")
    assert tree(library.places.datasets / "copy") == copied
    assert library.open(made["id"]).info()["excluded"] == 1


def test_a_copy_that_fails_leaves_nothing(library, root, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        library.copy_in(library.browse(root_id(library))["folders"][0]["id"], "copy")
    assert list(library.places.datasets.iterdir()) == []


def test_few_data_sets_stay_in_memory_and_an_open_one_is_the_same(library):
    ids = [library.create(f"set {i}")["id"] for i in range(6)]
    first = library.open(ids[0])
    assert library.open(ids[0]) is first
    for id in ids[1:]:
        library.open(id)
    assert library.open(ids[0]) is not first


def test_thumbnails_are_handed_out_and_data_sets_are_not(library):
    handed = [os.path.realpath(path) for path in library.places.handed_out]
    assert handed == [os.path.realpath(library.places.thumbnails)]


def test_what_a_kill_has_left_of_a_copy_goes_with_the_next(library, root):
    for name, age in ((".copy-old", 7200), (".copy-new", 60)):
        draw(library.places.datasets / name / "a.png")
        os.utime(library.places.datasets / name, (time.time() - age,) * 2)
    library.copy_in(library.browse(root_id(library))["folders"][0]["id"], "copy")
    assert sorted(path.name for path in library.places.datasets.iterdir()) == [".copy-new", "copy"]


def test_a_root_is_found_by_its_folder_and_a_hidden_one_by_its_own_root(library, root, tmp_path):
    inner = root / ".hidden/inner"
    draw(inner / "a.png")
    found = Library(Places(library.places.workspace, (root, inner)))
    for folder in (root, root / "cats", inner):
        assert found.open(found.id_of(folder)).root == folder.resolve()
    assert [found.id_of(folder) for folder in (root / ".hidden", found.places.datasets, tmp_path)] == [""] * 3


def test_names_that_are_no_text_hide_no_others(library, root, cats):
    for folder in (root, library.places.datasets):
        draw(folder / "caf\udce9/a.png")
    assert [folder["name"] for folder in library.browse(root_id(library))["folders"]] == ["cats"]
    assert [row["name"] for row in library.list_sets()["sets"]] == ["cats"]


def test_a_link_that_leads_out_is_passed_over_and_the_other_sets_are_listed(library, cats, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (library.places.datasets / "link").symlink_to(tmp_path / "elsewhere")
    assert [row["name"] for row in library.list_sets()["sets"]] == ["cats"]
