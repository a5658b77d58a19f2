"""The health check finds what is wrong, and its remedies can be undone and touch no picture."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from app.datasets import duplicates, health
from tests.data_sets import draw, image_hashes, tree, wait_until_known
from trainer.errors import UserError


@pytest.fixture
def ill(cats):
    """A data set with one of everything."""
    root = cats.root
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(root / "large.png", (1024, 768), seed=10, caption="red, cat")
    draw(root / "turned.jpg", (640, 480), seed=11, caption="a, sks, b", exif=exif)
    draw(root / "print.jpg", (640, 480), seed=12, caption="Sks one", mode="CMYK")
    draw(root / "clear.png", (640, 480), seed=13, caption="x", mode="RGBA")
    draw(root / "near1.jpg", (640, 480), seed=14, caption="x", quality=90)
    draw(root / "near2.jpg", (600, 450), seed=14, quality=60)
    (root / "copy.png").write_bytes((root / "large.png").read_bytes())
    Image.fromarray(np.full((600, 600), 40_000, dtype=np.uint16)).save(root / "deep.png")
    (root / "broken.jpg").write_bytes(b"no picture")
    (root / "alone.txt").write_bytes(b"no image")
    (root / "alone-masklabel.png").write_bytes(b"mask")
    (root / "b.txt").write_bytes("schönes Mädchen".encode("cp1252"))
    (root / "c.txt").write_bytes("Ünï".encode("utf-16"))
    cats.index.refresh(at_once=True)
    wait_until_known(cats)
    return cats


def findings(data_set, **asked):
    return {finding["kind"]: finding for finding in health.check(data_set, **asked)["findings"]}


def test_everything_is_found_counted_and_named(ill):
    found = {kind: finding["files"] for kind, finding in findings(ill, trigger="sks", too_small=512).items()}
    assert found["unreadable"] == ["broken.jpg"] and found["turned"] == ["turned.jpg"]
    assert found["cmyk"] == ["print.jpg"] and found["alpha"] == ["clear.png"] and found["deep"] == ["deep.png"]
    assert sorted(found["tiny"]) == ["5_more/d.png", "5_more/e.jpg", "a.png", "b.png", "c.png"]
    assert sorted(found["duplicate"]) == ["copy.png", "large.png"]
    assert sorted(found["similar"]) == ["near1.jpg", "near2.jpg"]
    assert sorted(found["not_utf8"]) == ["b.png", "c.png"]
    assert sorted(found["no_caption"]) == ["broken.jpg", "copy.png", "deep.png", "near2.jpg"]
    assert found["equal_caption"] == ["clear.png", "near1.jpg"]
    assert found["lone_caption"] == ["alone.txt"] and found["lone_mask"] == ["alone-masklabel.png"]
    assert "turned.jpg" not in found["no_trigger"] and "print.jpg" not in found["no_trigger"]
    assert "large.png" in found["no_trigger"] and "enormous" not in found


def test_all_files_of_a_large_finding_are_named(cats):
    [some] = [record for record in cats.records() if record.name == "c.png"]
    many = {f"{i}.png": replace(some, name=f"{i}.png", caption="same") for i in range(5000)}
    cats.index.refresh = lambda at_once=False: None  # 5000 images without as many files
    cats.index.records = many
    found = findings(cats)["equal_caption"]
    assert found["count"] == 5000 and set(found["files"]) == set(many) and found["groups"] == [list(many)]


def test_a_sound_set_has_no_findings_and_bad_ones_come_first(cats, ill):
    assert [finding["level"] for finding in health.check(ill)["findings"]] == sorted(
        (finding["level"] for finding in health.check(ill)["findings"]), key=["bad", "warn", "info"].index)
    sound = cats.root.parent / "sound"
    draw(sound / "a.png", (600, 600), seed=50, caption="one")
    draw(sound / "b.png", (600, 600), seed=51, caption="two")
    cats.index.root = cats.root = sound
    cats.index.refresh(at_once=True)
    wait_until_known(cats)
    assert health.check(cats)["findings"] == []


@pytest.mark.parametrize(("kind", "gone"), [
    ("unreadable", {"unreadable"}), ("tiny", {"tiny"}), ("duplicate", {"duplicate"}), ("similar", {"similar"}),
    ("not_utf8", {"not_utf8"}), ("no_trigger", {"no_trigger"}), ("lone_caption", {"lone_caption"}),
    ("lone_mask", {"lone_mask"})])
def test_a_remedy_mends_its_finding_is_undone_whole_and_keeps_every_picture(ill, kind, gone):
    old, hashes = tree(ill.root), image_hashes(ill.root)
    assert findings(ill, trigger="sks")[kind]["remedy"]["kind"] == kind
    answer = health.remedy(ill, kind, trigger="sks")
    assert answer["changed"] > 0 and answer["skipped"] == [] and answer["undo"]
    left = findings(ill, trigger="sks")
    assert not gone & left.keys()
    assert image_hashes(ill.root) == hashes
    ill.undo()
    assert tree(ill.root) == old


def test_captions_of_images_that_cannot_be_shown_are_not_lone(cats, tmp_path):
    outside = draw(tmp_path / "outside.png", seed=70)
    (cats.root / "link.png").symlink_to(outside)
    draw(cats.root / "1:2.png", seed=71, caption="of a name with a colon")
    (cats.root / "alias").symlink_to(cats.root / "5_more")
    for name in ("link.txt", "link-masklabel.png", "1:2-masklabel.png", "3:4.txt", "alone.txt", "a.TXT"):
        (cats.root / name).write_bytes(b"x")
    cats.index.refresh(at_once=True)
    assert "link.png" not in cats.index.records and "1:2.png" not in cats.index.records
    assert health.remedy(cats, "lone_mask")["changed"] == 0
    assert health.remedy(cats, "lone_caption")["changed"] == 2  # and the one that cannot be moved stops nothing
    assert sorted(file["name"] for file in cats.trash()["files"]) == ["a.TXT", "alone.txt"]


def test_remedies_do_what_they_say(ill):
    health.remedy(ill, "not_utf8")
    assert (ill.root / "b.txt").read_bytes() == "schönes Mädchen".encode()
    assert (ill.root / "c.txt").read_bytes() == "Ünï".encode()
    health.remedy(ill, "similar")
    cards = {card["name"]: card["excluded"] for card in ill.list_images(filter="excluded")["cards"]}
    assert cards == {"near2.jpg": True}  # the smaller one
    health.remedy(ill, "duplicate")
    assert [card["name"] for card in ill.list_images(filter="excluded")["cards"]] == ["copy.png", "near2.jpg"]
    health.remedy(ill, "no_trigger", trigger="sks")
    assert (ill.root / "large.txt").read_bytes() == b"sks, red, cat"


def test_captions_that_are_too_large_or_out_of_reach_are_told_apart_and_not_converted(cats):
    (cats.root / "a.txt").write_bytes("schönes Mädchen ".encode() * 80_000)
    (cats.root / "c.txt").mkdir()
    (cats.root / "b.txt").write_bytes("Mädchen".encode("cp1252"))
    cats.index.refresh(at_once=True)
    found, large = findings(cats), (cats.root / "a.txt").read_bytes()
    assert (found["not_utf8"]["files"], found["unread_caption"]["files"]) == (["b.png"], ["a.png", "c.png"])
    assert found["unread_caption"]["remedy"] is None
    assert health.remedy(cats, "not_utf8")["changed"] == 1 and (cats.root / "a.txt").read_bytes() == large


def test_a_caption_that_was_saved_as_utf8_meanwhile_is_not_converted(cats, monkeypatch):
    (cats.root / "b.txt").write_bytes("Mädchen".encode("cp1252"))
    cats.index.refresh(at_once=True)
    monkeypatch.setattr(cats.index, "refresh", lambda at_once=False: (cats.root / "b.txt").write_text("Mädchen"))
    assert health.remedy(cats, "not_utf8")["changed"] == 0 and (cats.root / "b.txt").read_text() == "Mädchen"


def test_a_finding_that_is_gone_changes_nothing_and_an_unknown_one_is_refused(cats):
    assert health.remedy(cats, "lone_mask")["changed"] == 0 and cats.info()["undo"] is None
    with pytest.raises(UserError, match="there is no remedy for"):
        health.remedy(cats, "alpha")


@pytest.mark.parametrize(("data", "text"), [
    ("Mädchen".encode(), "Mädchen"), ("Mädchen".encode("cp1252"), "Mädchen"),
    ("Mädchen".encode("utf-16"), "Mädchen"), (b"\x80 euro", "€ euro"),
    ("plain".encode("utf-16-le"), "plain"), ("plain".encode("utf-16-be"), "plain"), (b"a\x81b plain", "a\x81b plain")])
def test_old_encodings_are_told_apart(data, text):
    assert health.guess_text(data) == text


@pytest.mark.parametrize("data", ["日本語の説明".encode("shift_jis"), b"\x00\x00\x00", "中文".encode("gb18030")])
def test_an_encoding_that_cannot_be_told_is_not_guessed(data):
    with pytest.raises(UserError, match="its encoding cannot be told"):
        health.guess_text(data)


def test_pictures_that_differ_are_no_near_duplicates(cats):
    for seed in range(60, 100):
        draw(cats.root / f"{seed}.png", (64, 64), seed=seed)
    flat = Image.new("RGB", (64, 64), (255, 0, 0))
    flat.save(cats.root / "flat1.png")
    Image.new("RGB", (64, 64), (0, 0, 255)).save(cats.root / "flat2.png")
    cats.index.refresh(at_once=True)
    wait_until_known(cats)
    assert duplicates.similar(cats.records()) == []
