"""Uploads: whatever comes, nothing is overwritten unasked, nothing lands outside, and nothing fills the disk."""

import io
import stat
import zipfile
from contextlib import contextmanager

import pytest
from PIL import Image

from app.datasets import upload
from app.datasets.library import Library
from tests.data_sets import draw, tree, wait_until_known


@pytest.fixture
def inbox(tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def png(seed=30):
    packed = io.BytesIO()
    Image.new("RGB", (16, 16), (seed, 2 * seed, 255 - seed)).save(packed, "PNG")
    return packed.getvalue()


def send(data_set, inbox, **files):
    """Files by name, "__" standing for a dot and "_in_" for a slash; their contents."""
    came = []
    for i, (name, data) in enumerate(files.items()):
        path = inbox / f"{i}.upload"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        came.append((name.replace("__", ".").replace("_in_", "/"), path))
    return data_set.add_files(came)


def packed(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", ".").replace("_in_", "/"), data)
    return path


def test_images_and_captions_come_in_together_and_undo_takes_them_out(cats, inbox):
    old = tree(cats.root)
    answer = send(cats, inbox, new__png=png(), new__txt="a caption\n", dogs_in_x__png=png(31), dogs_in_x__txt="dog")
    assert (answer["added"], answer["captions"], answer["refused"]) == (2, 2, [])
    assert answer["undo"] == "add 2 images and 2 captions"
    new = {"new.png": png(), "new.txt": b"a caption\n", "dogs/x.png": png(31), "dogs/x.txt": b"dog"}
    assert tree(cats.root) == old | new
    cats.undo()
    assert tree(cats.root) == old
    assert sorted(file["name"] for file in cats.trash()["files"]) == sorted(new)
    cats.redo()
    assert tree(cats.root) == old | new and cats.trash()["files"] == []


def test_a_name_that_is_taken_gets_a_number_with_all_that_belongs_to_it(cats, inbox):
    old = tree(cats.root)
    answer = send(cats, inbox, a__png=png(), a__txt="mine", **{"a-masklabel__png": png()})
    assert answer["added"] == 1 and answer["refused"] == []
    assert tree(cats.root) == old | {"a-2.png": png(), "a-2.txt": b"mine", "a-2-masklabel.png": png()}
    send(cats, inbox, a__jpg=png(33))  # never beside a.png, whose caption it would share
    assert (cats.root / "a-3.jpg").exists()


def test_the_same_picture_is_not_taken_twice(cats, inbox):
    wait_until_known(cats)
    answer = send(cats, inbox, other__png=(cats.root / "a.png").read_bytes(), one__png=png(), two__png=png())
    assert answer["added"] == 1
    assert dict(answer["refused"]) == {"other.png": "is the same picture as a.png",
                                       "two.png": "is the same picture as one.png"}


def test_a_caption_for_an_image_that_is_here_takes_the_place_of_its_own(cats, inbox):
    old = tree(cats.root)
    answer = send(cats, inbox, a__txt="from elsewhere", c__txt="first", b__txt="blue, cat")
    assert answer["captions"] == 2
    assert tree(cats.root) == old | {"a.txt": b"from elsewhere", "c.txt": b"first"}
    cats.undo()
    assert tree(cats.root) == old


def test_what_belongs_to_a_refused_image_is_not_given_to_another_one_of_its_name(cats, inbox):
    wait_until_known(cats)
    old, b = tree(cats.root), (cats.root / "b.png").read_bytes()
    answer = send(cats, inbox, a__png=b, a__txt="of b", c__jpg=b"broken", c__txt="x", **{"a-masklabel__png": png()})
    assert answer["captions"] == 0 and tree(cats.root) == old
    reasons = dict(answer["refused"])
    assert reasons["a.png"] == "is the same picture as b.png"
    assert reasons["a.txt"] == reasons["a-masklabel.png"] == "belongs to a.png, which was not taken"
    assert reasons["c.txt"] == "belongs to c.jpg, which was not taken"
    again = send(cats, inbox, b__png=b, b__txt="a better one")  # the very image: its caption is meant
    assert again["captions"] == 1 and (cats.root / "b.txt").read_bytes() == b"a better one"


def test_an_image_does_not_come_to_a_caption_that_is_not_its_own(cats, inbox):
    for name, text in (("x", "other"), ("y", "same"), ("z", "lone")):
        (cats.root / f"{name}.txt").write_text(text)
    (cats.root / "w.txt").mkdir()
    answer = send(cats, inbox, x__png=png(1), x__txt="own", y__png=png(2), y__txt="same", z__png=png(3), w__png=png(4),
                  w__txt="own", c__txt="first")
    assert (answer["added"], answer["refused"]) == (4, [])
    captions = {record.name: record.caption for record in cats.records()}
    assert captions.items() >= {"x-2.png": "own", "y.png": "same", "z.png": "lone", "w-2.png": "own"}.items()
    assert "w.txt: cannot be read" in send(cats, inbox, w__txt="own")["refused"][0][1]


def test_of_two_captions_for_one_image_the_first_is_taken(cats, inbox):
    answer = send(cats, inbox, new__png=png(), new__txt="one", new__TXT="two")
    assert answer["refused"] == [("new.TXT", "there is a new.txt already")]
    assert (cats.root / "new.txt").read_bytes() == b"one"


def test_what_is_no_part_of_a_data_set_is_refused_by_name(cats, inbox):
    old = tree(cats.root)
    answer = send(cats, inbox, page__html="<html>", broken__png=b"no picture", empty__jpg=b"", tool__exe=b"MZ")
    reasons = dict(answer["refused"])
    assert answer["added"] == 0 and tree(cats.root) == old and answer["undo"] is None
    assert "is no image" in reasons["page.html"] and "not an image" in reasons["broken.png"]
    assert reasons["empty.jpg"] == "the file is empty" and reasons.keys() >= {"tool.exe"}
    assert cats.trash()["files"] == []


@pytest.mark.parametrize(("name", "lands"), [
    ("C:\\x\\a b.png", "C_/x/a b.png"), ("what?.png", "what_.png"), ("con.png", "con_.png"), ("ü.png", "ü.png"),
    ("x" * 300 + ".png", "x" * 200 + ".png"), ("猫" * 100 + ".png", "猫" * 66 + ".png"),
    ("a." + "猫" * 100 + "/b.png", "a." + "猫" * 13 + "/b.png"), ("a/" * 500 + "b.png", None),
    (".hidden.png", "hidden.png"), ("../../up.png", None), ("/abs.png", None), ("a/../b.png", None),
    ("a//b.png", None)])
def test_names_are_made_safe_or_refused(cats, inbox, name, lands):
    old = set(tree(cats.root))
    (inbox / "f").write_bytes(png())
    answer = cats.add_files([(name, inbox / "f")])
    assert set(tree(cats.root)) - old == ({lands} if lands else set())
    assert bool(answer["refused"]) == (lands is None)


def test_what_belongs_together_still_does_when_long_names_are_cut(cats, inbox):
    old, cut = tree(cats.root), "猫" * 66
    for stem in ("猫" * 100, "猫" * 70):  # both are cut to the same one
        files = {".png": png(len(stem)), ".txt": "cat", "-masklabel.png": png()}
        answer = send(cats, inbox, **{stem + ending: data for ending, data in files.items()})
        assert (answer["added"], answer["captions"], answer["refused"]) == (1, 1, [])
    assert set(tree(cats.root)) - set(old) == {
        f"{cut}{end}" for end in (".png", ".txt", "-masklabel.png", "-2.png", "-2.txt", "-2-masklabel.png")}


def test_a_file_that_cannot_be_stored_stops_no_other(cats, inbox):
    path = packed(inbox / "z.zip", d__png=png(31), d__png_in_x__png=png(32), good__png=png(33))
    answer = cats.add_files([("z.zip", path)])
    reason = "cannot be stored (File exists); rename it or its folder"
    assert (answer["added"], answer["refused"]) == (2, [("z.zip: d.png/x.png", reason)])


def test_a_zip_is_unpacked_with_its_folders(cats, inbox):
    old = tree(cats.root)
    packed(inbox / "set.zip", x__png=png(), x__txt="x", deep_in_y__png=png(32), read__md="hi")
    with zipfile.ZipFile(inbox / "set.zip", "a") as archive:
        archive.writestr("__MACOSX/._x.png", b"?")
        archive.writestr("empty/", b"")
    answer = cats.add_files([("set.zip", inbox / "set.zip")])
    assert tree(cats.root) == old | {"x.png": png(), "x.txt": b"x", "deep/y.png": png(32)}
    assert [name for name, _ in answer["refused"]] == ["set.zip: read.md"]


def test_a_zip_does_not_break_out(cats, inbox, tmp_path):
    before = {path for path in tmp_path.rglob("*") if ".studio" not in path.parts}
    with zipfile.ZipFile(inbox / "evil.zip", "w") as archive:
        for name in ("../up.png", "/abs.png", "..\\win.png", "a/../../b.png", ".studio/journal.png"):
            archive.writestr(name, png())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    answer = cats.add_files([("evil.zip", inbox / "evil.zip")])
    after = {path for path in tmp_path.rglob("*") if ".studio" not in path.parts}
    landed = {path.relative_to(cats.root).as_posix() for path in after - before - {inbox / "evil.zip"}}
    assert landed <= {"studio", "studio/journal.png"} and len(answer["refused"]) >= 4


@pytest.mark.parametrize("kind", ["bomb", "many", "password", "broken", "lie"])
def test_a_zip_that_would_do_harm_is_refused_whole(cats, inbox, monkeypatch, kind):
    old, path = tree(cats.root), inbox / "z.zip"
    monkeypatch.setattr(upload, "FREE_RATIO", 100_000)
    monkeypatch.setattr(upload, "MOST_MEMBERS", 20)
    packed(path, a__png=bytes(20_000_000)) if kind == "bomb" else packed(
        path, **{f"{i}__png": png() for i in range(30 if kind == "many" else 1)})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    if kind == "password":
        data[at + 8] |= 1
        data[6] |= 1
    elif kind == "lie":  # more in it than it says
        data[at + 24:at + 28] = (10).to_bytes(4, "little")
    path.write_bytes(data[:len(data) // 2] if kind == "broken" else data)
    answer = cats.add_files([("z.zip", path)])
    assert answer["added"] == 0 and answer["refused"] and tree(cats.root) == old
    words = {"bomb": "hundred times", "many": "30 files", "password": "password", "broken": "cannot be unpacked",
             "lie": ""}
    assert words[kind] in answer["refused"][0][1]


def test_copies_that_were_not_taken_do_not_stay(cats, inbox):
    send(cats, inbox, broken__png=b"no", x__html=b"x")
    assert [path.name for path in (cats.root / ".studio").rglob("*") if path.is_file() and path.name != "lock"] == []


def test_copies_are_no_trash_that_others_see_and_empty_before_they_are_taken_in(cats, library, inbox, monkeypatch):
    other, staged = Library(library.places).open(cats.id), upload.staged

    @contextmanager
    def beside_another(root, files):
        with staged(root, files) as batch:
            assert other.trash()["files"] == [] and other.empty_trash()["removed"] == 0
            yield batch

    monkeypatch.setattr(upload, "staged", beside_another)
    assert send(cats, inbox, new__png=png(), new__txt="a caption")["added"] == 1
    assert (cats.root / "new.txt").read_text() == "a caption"


def test_a_caption_that_no_one_could_edit_is_left_out_and_nothing_else(cats, inbox):
    old = tree(cats.root)
    answer = send(cats, inbox, new__png=png(), new__txt="x" * 1_000_001, a__txt="y" * 1_000_001, b__txt="z" * 1_000_000)
    reason = "has 1000001 bytes; the most for a caption is 1000000"
    assert answer["refused"] == [("new.txt", reason), ("a.txt", reason)]
    assert tree(cats.root) == old | {"new.png": png(), "b.txt": b"z" * 1_000_000}


def test_a_photograph_of_an_unreadable_kind_comes_in_and_is_told_by_the_health_check(cats, inbox):
    assert send(cats, inbox, phone__heic=b"ftypheic")["added"] == 1
    wait_until_known(cats)
    assert "HEIC files are not read" in cats.list_images(names=["phone.heic"])["cards"][0]["trouble"]


def test_the_uploaded_file_itself_stays(cats, tmp_path):
    draw(tmp_path / "mine.png", seed=40)
    cats.add_files([("mine.png", tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_bytes() == (cats.root / "mine.png").read_bytes()
