"""Which images a data set has: what is excluded is told by a file beside the images, which any editor may write."""

import pytest

from trainer.data import folders
from trainer.errors import UserError


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_excluded_images_are_passed_over_wherever_the_data_set_begins(tmp_path):
    make(tmp_path, "a.png", "b.png")
    make(tmp_path / "5_cats", "a.png", "c.png")
    (tmp_path / "5_cats" / ".excluded").write_text("a.png\n")
    assert [path.relative_to(tmp_path).as_posix() for path, _ in folders.find_images(tmp_path)] == [
        "5_cats/c.png", "a.png", "b.png"]
    assert folders.find_images(tmp_path / "5_cats") == [(tmp_path / "5_cats" / "c.png", 5)]


def test_a_data_set_of_excluded_images_says_so(tmp_path):
    make(tmp_path, "a.png", "b.png")
    (tmp_path / ".excluded").write_text("b.png\na.png")
    with pytest.raises(UserError, match="data.folder: all 2 images in .* are excluded"):
        folders.find_images(tmp_path)


@pytest.mark.parametrize("data", [b"a b.png\n\xc3\xbc.png\n", b"\xef\xbb\xbfa b.png\r\n\r\n\xc3\xbc.png"])
def test_the_list_is_read_as_any_editor_writes_it(data):
    assert folders.parse_excluded(data) == {"a b.png", "ü.png"}


def test_the_list_is_written_in_order_and_not_at_all_when_empty():
    assert folders.format_excluded({"b", "a", "\udcff"}) == b"a\nb\n\xff\n"
    assert folders.parse_excluded(b"a\n\xff\n") == {"a", "\udcff"}
    assert folders.format_excluded([]) is None


def test_a_list_that_cannot_be_read_is_a_plain_message(tmp_path):
    (tmp_path / ".excluded").mkdir()
    with pytest.raises(UserError, match="excluded: the list of excluded images cannot be read: .*; delete it"):
        folders.excluded_in(tmp_path)


@pytest.mark.parametrize(("name", "is_image"), [
    ("a.PNG", True), ("phone.heic", True), ("a-masklabel.png", False), ("a-MaskLabel.PNG", False), (".a.png", False),
    ("a.txt", False), ("png", False)])
def test_images_are_known_by_their_names(name, is_image):
    assert folders.is_image(name) is is_image
