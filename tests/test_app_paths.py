"""The gate from names to paths lets nothing out of its folder."""

import os

import pytest

from app.paths import Places, inside
from trainer import run
from trainer.errors import UserError


@pytest.mark.parametrize("name", [
    "", ".", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//etc/passwd", "\\\\box\\share", "..\\x", "C:\\x",
    "C:x", "x\0.png", "x:stream", "a/./../../b", "n" * 5000,
])
def test_a_name_that_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(UserError):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a b.png", "samples/000001_00.png", ".hidden", "ä.txt", "...dots"])
def test_a_plain_name_lies_in_its_folder(tmp_path, name):
    assert inside(tmp_path, name) == (tmp_path / name).resolve()


def test_a_link_that_leads_out_is_refused(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    os.symlink(tmp_path / "secret", root / "leak")
    os.symlink(tmp_path, root / "up")
    os.symlink(root / "loop", root / "loop")
    os.symlink(root / "in", root / "fine")
    for name in ("leak", "up", "up/secret", "loop/x"):
        with pytest.raises(UserError):
            inside(root, name)
    assert inside(root, "fine") == (root / "in").resolve()


def test_a_root_that_is_a_link_itself_is_a_root(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "root")
    assert inside(tmp_path / "root", "a") == (tmp_path / "real" / "a").resolve()


def test_only_names_of_runs_are_runs(tmp_path):
    places = Places(tmp_path)
    made = run.create(tmp_path, "cat style", "version = 1\n")
    (tmp_path / "runs" / "folder").mkdir()
    assert places.run("cat style").path == made.path
    for name in ("folder", "none", "../runs/cat style", "", ".", "cat style/samples", "a" * 300, "\0"):
        with pytest.raises(UserError, match="there is no run called"):
            places.run(name)


def test_pictures_and_results_of_a_run_are_handed_out_and_nothing_else(tmp_path):
    places = Places(tmp_path)
    made = run.create(tmp_path, "a", "version = 1\n")
    places.hand_out(made)
    places.hand_out(made)
    assert places.handed_out == [str(made.samples), str(made.exports), str(made.result)]


def test_a_samples_folder_that_leads_elsewhere_is_not_handed_out(tmp_path):
    places = Places(tmp_path / "w")
    made = run.create(tmp_path / "w", "a", "version = 1\n")
    os.symlink(tmp_path, made.samples)
    made.result.write_bytes(b"weights")
    places.hand_out(made)  # the run can be looked at all the same
    assert places.handed_out == [str(made.exports), str(made.result)]


def test_only_thumbnails_of_data_sets_are_handed_out(tmp_path):
    places = Places(tmp_path / "w")
    places.hand_out_thumbnails()
    places.hand_out_thumbnails()
    assert places.handed_out == [str(tmp_path / "w" / "thumbnails")]


def test_a_thumbnail_folder_that_leads_elsewhere_is_not_handed_out(tmp_path):
    places = Places(tmp_path / "w")
    (tmp_path / "w").mkdir()
    (tmp_path / "secret").mkdir()
    os.symlink(tmp_path / "secret", places.thumbnails)
    places.hand_out_thumbnails()
    assert places.handed_out == []
