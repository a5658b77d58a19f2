"""Presets are compared with the shipped one that they come from, and single settings go back to it."""

import pytest

from app import differences, form
from trainer import preset
from trainer.errors import UserError

DEMO = preset.read_text(preset.SHIPPED / "demo.toml")


def found(text, folder=preset.SHIPPED, chosen=""):
    answer = differences.of(form.values_of(text), chosen, folder)
    return answer["reference"], {item["where"]: (item["now"], item["shipped"]) for item in answer["differences"]}


@pytest.mark.parametrize("name", differences.shipped())
def test_each_shipped_preset_is_nearest_to_itself(name):
    assert found(preset.read_text(preset.SHIPPED / f"{name}.toml")) == (name, {})


def test_what_differs_is_told_with_both_values():
    text = form.change(form.change(DEMO, "adapter", "rank", "4"), "train", "lr", "5e-4")
    assert found(text) == ("demo", {"adapter.rank": ("4", "8"), "train.lr": (
        "lora 0.001, stiefel 0.005, stella 0.0005, trilora 0.002",
        "lora 0.001, stiefel 0.005, stella 0.002, trilora 0.002")})


def test_a_default_written_out_and_a_path_written_out_are_no_differences(tmp_path):
    moved = form.settled(DEMO, preset.SHIPPED)
    assert moved != DEMO and found(form.change(moved, "data", "flip", False), tmp_path) == ("demo", {})


def test_the_nearest_is_of_the_same_kind_of_model_or_the_chosen_one():
    text = '[model]\nfamily = "sdxl"\nbase = "x"\n'
    assert found(text)[0] == "sdxl_stiefel" and found(text, chosen="demo")[0] == "demo"
    assert found("x = =") == ("", {})


@pytest.mark.parametrize(("where", "typed"), [
    ("adapter.rank", "4"), ("train.lr", "1"), ("sample.prompts", ""), ("train.grad_accum", "3"), ("data.folder", "x")])
def test_one_setting_goes_back(where, typed):
    section, key = where.split(".")
    changed = form.change(DEMO, section, key, typed)
    assert list(found(changed)[1]) == [where]
    back = differences.take_back(changed, section, key, "demo", preset.SHIPPED)
    assert found(back) == ("demo", {}) and back.count("#") >= DEMO.count("#") - 2


def test_in_ones_own_folder_a_path_goes_back_written_out(tmp_path):
    text = form.change(form.settled(DEMO, preset.SHIPPED), "data", "folder", "x")
    back = differences.take_back(text, "data", "folder", "demo", tmp_path)
    assert f'folder = "{preset.SHIPPED}/demo/concept"' in back


@pytest.mark.parametrize("wrong", [("adapter", "nothing", "demo"), ("no", "rank", "demo"), ("adapter", "rank", "../x")])
def test_what_is_not_there_is_refused(wrong):
    with pytest.raises(UserError):
        differences.take_back(DEMO, *wrong, preset.SHIPPED)
    with pytest.raises(UserError, match="not valid TOML"):
        differences.take_back("x = =", "adapter", "rank", "demo", preset.SHIPPED)
