"""Undo in a data set: after a restart, beside another window, and where files were changed outside."""

from app.datasets.library import Library
from tests.data_sets import card, tree


def test_undo_and_redo_go_on_after_a_restart(cats, library):
    cats.save_caption("b.png", "one", card(cats, "b.png")["version"])
    cats.exclude(["a.png"])
    again = Library(library.places).open(cats.id)
    assert (again.info()["undo"], again.info()["redo"]) == ("exclude 1 image", None)
    again.undo()
    third = Library(library.places).open(cats.id)
    assert (third.info()["undo"], third.info()["redo"]) == ("edit the caption of b.png", "exclude 1 image")
    third.undo()
    assert (cats.root / "b.txt").read_bytes() == b"blue, cat"


def test_undo_and_redo_leave_alone_what_another_window_did_since(cats, library):
    one, two = cats, Library(library.places).open(cats.id)
    for name in ("a.png", "b.png"):
        shown = one.save_caption(name, "by one", card(one, name)["version"])
    two.exclude(["c.png"])
    old = tree(cats.root)
    answer = one.undo(shown["undo_id"])
    assert (answer["done"], answer["undo"]) == (None, "exclude 1 image") and tree(cats.root) == old
    shown = one.undo(answer["undo_id"])
    assert shown["done"] == shown["redo"] == "exclude 1 image"
    two.undo()
    old = tree(cats.root)
    answer = one.redo(shown["redo_id"])
    assert (answer["done"], answer["redo"]) == (None, "edit the caption of b.png") and tree(cats.root) == old
    assert one.redo(answer["redo_id"])["done"] == "edit the caption of b.png"


def test_undo_tells_what_was_changed_outside_and_leaves_it(cats):
    cats.apply_captions("all", {"a.png": "new a", "b.png": "new b"})
    (cats.root / "b.txt").write_bytes(b"by an editor")
    assert cats.undo()["conflict"] == {"what": "all", "files": [("b.txt", "it was changed outside since")]}
    assert (cats.root / "a.txt").read_bytes() == b"new a"
    assert cats.undo(skip_changed=True)["done"] == "all"
    assert (cats.root / "a.txt").read_bytes().startswith(b"red")
    assert (cats.root / "b.txt").read_bytes() == b"by an editor"
