"""Data sets: any folder works, every file left out has a reason, and no file is ever changed."""

import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pixels import load_pixels
from trainer.data import dataset, images
from trainer.data.dataset import ImageError, scan, split
from trainer.errors import UserError

GREEN = (0, 200, 0)


def draw(path, size=(32, 24), colour=GREEN, caption=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def names(found):
    return [item.path.name for item in found.items]


def test_any_folder_with_sub_folders_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.PNG", "a.jpeg", "sub/deep/c.webp", "sub/d.bmp", "e.tif", "f.gif"):
        draw(tmp_path / name)
    draw(tmp_path / "caption.png", caption="one\ntwo")
    (tmp_path / "notes.txt").write_text("no image")
    found = scan([tmp_path])
    assert names(found) == ["a.jpeg", "b.PNG", "caption.png", "e.tif", "f.gif", "d.bmp", "c.webp"]
    assert [item.caption for item in found.items if item.caption] == ["one\ntwo"] and not found.skipped


def test_an_item_holds_upright_size_and_content_hash(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = draw(tmp_path / "a.jpg", exif=exif)
    item = scan([tmp_path]).items[0]
    assert (item.width, item.height) == (24, 32)
    assert item.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_repeats_come_from_the_nearest_numbered_folder_times_the_setting(tmp_path):
    for name in ("5_cat/a.png", "5_cat/sub/b.png", "5_cat/2_close/c.png", "plain/d.png", "2024_summer/e.png"):
        draw(tmp_path / "set" / name)
    counts = {item.path.stem: item.repeats for item in scan([tmp_path / "set"], repeats=3).items}
    assert counts == {"a": 15, "b": 15, "c": 6, "d": 3, "e": 3}
    assert scan([tmp_path / "set" / "5_cat" / "2_close"]).items[0].repeats == 2


def test_hidden_files_masks_and_rounds_of_links_are_passed_over(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "a-masklabel.png")
    draw(tmp_path / "._a.png")
    draw(tmp_path / ".trash" / "b.png")
    os.symlink(tmp_path, tmp_path / "round")
    assert names(scan([tmp_path])) == ["a.png"]


def test_everything_left_out_has_its_reason(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "0_off" / "off.png")
    draw(tmp_path / "cut.jpg", size=(300, 300))
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[:len(data) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "phone.HEIC").write_bytes(b"x")
    found = scan([tmp_path])
    reasons = {entry.file.name: entry.reason for entry in found.skipped}
    assert names(found) == ["a.png"] and reasons.keys() == {"off.png", "cut.jpg", "empty.png", "phone.HEIC"}
    assert reasons["empty.png"] == "the file is empty" and "HEIC files are not read" in reasons["phone.HEIC"]
    assert reasons["cut.jpg"].startswith("broken") and "0 repeats" in reasons["off.png"]


def test_equal_images_are_kept(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    items = scan([tmp_path]).items
    assert len(items) == 2 and items[0].sha256 == items[1].sha256


def test_folders_that_give_nothing_are_plain_messages(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    draw(tmp_path / "file.png")
    for name, words in [("none", "is not there"), ("file.png", "is a file, not a folder"),
                        ("empty", "no images in .*empty or its sub-folders"), ("broken", "a.png: not an image that")]:
        with pytest.raises(UserError, match=words):
            scan([tmp_path / name])


def test_all_captions_in_other_encodings_are_told_at_once(tmp_path):
    for name in "abc":
        draw(tmp_path / f"{name}.png", caption="fine")
    for name in "ac":
        (tmp_path / f"{name}.txt").write_bytes("Mädchen".encode("latin-1"))
    with pytest.raises(UserError, match=r"(?s)a\.txt: .*UTF-8.*\n.*c\.txt: .*UTF-8") as error:
        scan([tmp_path])
    assert "b.txt" not in str(error.value)


def test_progress_is_told_for_every_file(tmp_path):
    for name in "abc":
        draw(tmp_path / f"{name}.png")
    told = []
    scan([tmp_path], progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_split_goes_by_content_keeps_twins_together_and_holds_one_at_least(tmp_path):
    for i in range(20):
        draw(tmp_path / f"{i}.png", colour=(i, 0, 0))
    draw(tmp_path / "twin.png", colour=(3, 0, 0))
    items = scan([tmp_path]).items
    train, held = split(items, 0.25, seed=7)
    assert len({item.sha256 for item in held}) == 5 and set(train) | set(held) == set(items)
    assert not {item.sha256 for item in train} & {item.sha256 for item in held}
    assert set(split(items[::-1], 0.25, seed=7)[1]) == set(held) != set(split(items, 0.25, seed=8)[1])
    assert len({item.sha256 for item in split(items, 0.001, seed=7)[1]}) == 1
    with pytest.raises(UserError, match="none would be left to train on"):
        split(items[:1], 0.1, seed=0)


def gradient(path, size=(64, 32)):
    """Red grows to the right, green downwards."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 252, size[0])[None, :]
    pixels[..., 1] = np.linspace(0, 248, size[1])[:, None]
    Image.fromarray(pixels).save(path)
    return pixels


def test_pixels_are_the_crop_scaled_to_one(tmp_path):
    pixels = gradient(tmp_path / "a.png")
    item = scan([tmp_path]).items[0]
    tensor = load_pixels(item, (32, 32), (5, 0), False)
    assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32
    expected = torch.from_numpy(pixels[:, 5:37].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(tensor, expected) and tensor.min() >= -1 and tensor.max() <= 1
    assert torch.equal(load_pixels(item, (32, 32), (5, 0), True), expected.flip(-1))


def test_a_larger_image_is_resized_to_cover_with_its_shape_kept(tmp_path):
    gradient(tmp_path / "a.png", (256, 128))
    item = scan([tmp_path]).items[0]
    right = load_pixels(item, (64, 64), (64, 0), False)
    assert right.shape == (3, 64, 64)
    assert abs(right[0, 32, 0] - (126.5 / 127.5 - 1)) < 0.02 and right[0, 32, -1] > 0.95


def test_an_image_that_changed_or_vanished_after_the_scan_is_refused(tmp_path):
    path = draw(tmp_path / "a.png")
    item = scan([tmp_path]).items[0]
    draw(path, colour=(1, 2, 3))
    with pytest.raises(ImageError, match="changed since"):
        load_pixels(item, (32, 32), (0, 0), False)
    path.unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        load_pixels(item, (32, 32), (0, 0), False)


def test_a_strip_that_would_be_enlarged_beyond_measure_is_refused(tmp_path, monkeypatch):
    draw(tmp_path / "a.png", size=(2, 600))
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    with pytest.raises(ImageError, match="2 × 600 pixels are too narrow a strip"):
        load_pixels(scan([tmp_path]).items[0], (256, 256), (0, 0), False)


def test_no_file_of_the_user_changes(tmp_path):
    draw(tmp_path / "a.png", caption="a cat")
    draw(tmp_path / "b.jpg", quality=95)
    (tmp_path / "broken.png").write_bytes(b"no image")

    def state():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode)
                for path in tmp_path.rglob("*") if path.is_file()}

    before = state()
    for item in scan([tmp_path]).items:
        load_pixels(item, (16, 16), (0, 0), True)
    assert state() == before


def test_excluded_images_are_counted_and_masks_are_neither_images_nor_counted(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    Image.new("L", (8, 8)).save(tmp_path / "a-masklabel.png")
    (tmp_path / ".excluded").write_text("b.png\ngone.png\n")
    found = dataset.scan([tmp_path], masks="file")
    assert [item.path.name for item in found.items] == ["a.png", "c.png"] and found.excluded == 1
    assert [item.mask is not None for item in found.items] == [True, False]
