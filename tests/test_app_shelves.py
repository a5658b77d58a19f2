"""Preset files: saved over nobody else's work, deleted into the trash and brought back."""

import pytest

from app import shelves
from app.paths import Places
from trainer import preset
from trainer.errors import UserError

TEXT = '[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "pictures"\n[train]\nsteps = 3\n'


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path)


def test_a_second_save_over_a_changed_file_is_refused(places):
    other, mine = TEXT + "batch_size = 2\n", TEXT + "batch_size = 3\n"
    tag = shelves.tag(shelves.save(places, "a", TEXT, "own").text)
    assert shelves.save(places, "a", other, "own") is None  # a name that is taken
    assert shelves.save(places, "a", other, "own", known=tag) == (other, "")
    with pytest.raises(shelves.Changed, match="changed by somebody else"):
        shelves.save(places, "a", mine, "own", known=tag)
    assert preset.read_text(places.presets / "a.toml") == other
    saved = shelves.save(places, "a", mine, "own", known=tag, replace=True)
    assert saved.text == preset.read_text(places.presets / "a.toml") == mine
    back = shelves.restore(places, saved.thrown, replace=True)
    assert back.name == "a" and preset.read_text(places.presets / "a.toml") == other
    assert shelves.restore(places, back.thrown, replace=True).name == "a"
    assert preset.read_text(places.presets / "a.toml") == mine


def test_what_is_deleted_can_be_brought_back_but_over_nothing(places):
    shelves.save(places, "my own", TEXT, "own")
    thrown = shelves.delete(places, "my own")
    assert shelves.names(places)["own"] == [] and len(list((places.workspace / "trash/presets").iterdir())) == 1
    shelves.save(places, "my own", TEXT + "batch_size = 2\n", "own")
    with pytest.raises(UserError, match="another preset called my own"):
        shelves.restore(places, thrown)
    (places.presets / "my own.toml").unlink()
    assert shelves.restore(places, thrown) == ("my own", "")
    assert preset.read_text(places.presets / "my own.toml") == TEXT


def test_a_name_that_is_no_text_hides_no_others(places):
    shelves.save(places, "a", TEXT, "own")
    (places.presets / "caf\udce9.toml").write_text(TEXT)
    assert shelves.names(places)["own"] == ["a"]


@pytest.mark.parametrize("name", ["demo", "../a", "", "a/b", "x" * 300, "a\0"])
def test_only_ones_own_can_be_deleted(places, name):
    with pytest.raises(UserError):
        shelves.delete(places, name)


@pytest.mark.parametrize("thrown", ["a.toml", "../../a.toml", "", "20260101-000000-000000-../x.toml"])
def test_only_what_is_in_the_trash_comes_back(places, thrown):
    with pytest.raises(UserError):
        shelves.restore(places, thrown)


def test_a_link_in_the_trash_is_not_followed(places, tmp_path):
    shelves.save(places, "a", TEXT, "own")
    thrown = shelves.delete(places, "a")
    (places.workspace / "trash/presets" / thrown).unlink()
    (tmp_path / "secret.toml").write_text(TEXT)
    (places.workspace / "trash/presets" / thrown).symlink_to(tmp_path / "secret.toml")
    with pytest.raises(UserError):
        shelves.restore(places, thrown)
    assert (tmp_path / "secret.toml").exists()
