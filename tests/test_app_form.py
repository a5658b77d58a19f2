"""The preset as a form: every setting described by the schema, and the text changed only where it was asked."""

import json

import pytest

from app import form
from app.labels import LABELS, SECTIONS
from trainer import preset, schema
from trainer.errors import UserError

TEXT = """# A comment that stays
[model]
family = "sd15"
base = "base"  # which one

[data]
folder = "pictures"

[adapter]
rank = 16

[train]
steps = 1_000
lr = 1e-4
"""


def field(name):
    [found] = [item for item in form.describe() if f"{item['section']}.{item['key']}" == name]
    return found


def test_every_setting_is_in_the_form_with_a_help_text_the_main_ones_first():
    described = form.describe()
    names = [f"{item['section']}.{item['key']}" for item in described]
    assert names[:len(form.MAIN)] == list(form.MAIN) and [item["main"] for item in described].count(True) == 15
    assert sorted(names) == sorted(f"{section}.{key}" for section in schema.SECTIONS for key in schema.fields(section))
    assert all(item["help"] and item["label"] and item["group"] for item in described)
    assert len({item["label"] for item in described}) == len(described)  # no two are called the same
    assert {item["kind"] for item in described} == {"choice", "several", "bool", "int", "float", "text", "path",
                                                    "lines"}
    json.dumps(described, allow_nan=False)
    assert set(LABELS) <= set(names) and set(SECTIONS) == set(schema.SECTIONS)


def test_kinds_limits_and_defaults_come_from_the_schema():
    assert field("adapter.method")["choices"][:3] == ["lora", "stiefel", "stella"]
    rank = field("adapter.rank")
    assert (rank["kind"], rank["min"], rank["max"], rank["default"]) == ("int", 1, 512, 16)
    assert field("data.resolution")["step"] == 8
    assert (field("model.base")["kind"], field("model.base")["required"]) == ("path", True)
    assert field("data.folder")["kind"] == field("sample.prompts")["kind"] == "lines"
    assert field("train.lr")["kind"] == "float"
    assert field("adapter.alpha")["follows"] == "rank"
    assert field("adapter.targets")["kind"] == "several" and "single_blocks" in field("adapter.targets")["choices"]
    assert field("train.lr")["by"] == ["adapter", "method"] and field("train.lr")["rates"] == schema.METHOD_LR


def test_values_are_those_of_the_text_and_faults_those_of_the_command_line():
    state = form.state_of(TEXT, "a.toml")
    assert state["problems"] == [] and state["values"]["train"] == {"steps": 1000, "lr": 1e-4}
    bad = TEXT.replace("rank = 16", "rank = 16\nalpha = 8").replace("steps", "step").replace('"sd15"', '"sd16"')
    with pytest.raises(UserError) as error:
        preset.parse(bad, "a.toml")
    state = form.state_of(bad, "a.toml")
    assert [problem["text"] for problem in state["problems"]] == str(error.value).splitlines()
    assert {(problem["line"], problem["where"]) for problem in state["problems"]} >= {
        (3, "model.family"), (11, "adapter.alpha"), (14, "train.step")}


def test_a_text_that_is_no_toml_has_a_line_and_no_values():
    state = form.state_of(TEXT + "x = = 1", "a.toml")
    assert state["values"] is None
    assert state["problems"][0]["line"] == 15 and "not valid TOML" in state["problems"][0]["text"]


@pytest.mark.parametrize("text", ["lr = nan", "lr = inf", "steps = 99999999999999999999", "steps = 2024-01-01"])
def test_values_without_a_word_in_json_are_written_out(text):
    state = form.state_of(f"[train]\n{text}\n", "a.toml")
    json.dumps(state, allow_nan=False)
    assert isinstance(next(iter(state["values"]["train"].values())), str)


@pytest.mark.parametrize(("name", "typed", "line"), [
    ("adapter.rank", "8", "rank = 8"),
    ("adapter.rank", "eight", 'rank = "eight"'),
    ("train.lr", "5e-5", "lr = 5e-5"),
    ("train.steps", " 2000 ", "steps = 2000"),
    ("data.trigger", "my style", 'trigger = "my style"'),
    ("data.flip", True, "flip = true"),
    ("data.folder", "one", 'folder = "one"'),
    ("data.folder", "one\n\n two ", 'folder = ["one", "two"]'),
    ("sample.prompts", "a cat", 'prompts = ["a cat"]'),
])
def test_a_change_touches_one_line(name, typed, line):
    changed = form.change(TEXT, *name.split("."), typed)
    assert line in changed.splitlines()
    kept = [old for old in TEXT.splitlines() if not old.startswith(f"{name.split('.')[1]} =")]
    assert [old for old in kept if old not in changed.splitlines()] == []


def test_an_emptied_field_is_taken_out():
    assert "lr" not in form.change(TEXT, "train", "lr", "")


@pytest.mark.parametrize("name", ["adapter.alpha", "adapter.nothing", "nowhere.rank", "."])
def test_what_cannot_be_set_is_refused(name):
    with pytest.raises(UserError):
        form.change(TEXT, *name.split("."), "3")


def test_a_broken_text_is_not_changed_by_the_form():
    with pytest.raises(UserError, match="not valid TOML"):
        form.change("x = =", "adapter", "rank", "3")


def test_paths_beside_a_preset_are_written_out_when_it_moves(tmp_path):
    (tmp_path / "pictures").mkdir()
    settled = form.settled(TEXT, tmp_path)
    assert f'folder = "{tmp_path / "pictures"}"' in settled
    assert 'base = "base"  # which one' in settled  # not there: a hub id, or meant from where one stands
    assert settled.splitlines()[0] == "# A comment that stays"
    assert form.settled("x = =", tmp_path) == "x = ="


RATES = "[adapter]\nmethod = 'stiefel'\n[train]\nlr = { lora = 1e-3, stiefel = 5e-3 }  # high\n"


@pytest.mark.parametrize(("typed", "table"), [
    ("2e-4", "{ lora = 1e-3, stiefel = 2e-4 }"), ("", "{ lora = 1e-3  }"),
    ("much", '{ lora = 1e-3, stiefel = "much" }'),
])
def test_in_a_table_of_rates_only_the_methods_own_changes(typed, table):
    changed = form.change(RATES, "train", "lr", typed)
    assert changed == RATES.replace("{ lora = 1e-3, stiefel = 5e-3 }", table)


LISTED = """[sample]
prompts = [
    "one",    # first
    "two",    # second
    "three",  # third
]
"""


@pytest.mark.parametrize(("typed", "gone", "come"), [
    (["one", "three"], {"two"}, set()), (["one", "TWO", "three"], {"two"}, {"TWO"}),
    (["zero", "one", "two", "three"], set(), {"zero"}), (["two", "three", "four"], {"one"}, {"four"}),
    (["three"], {"one", "two"}, set()), (["one", "two", "three", "three"], set(), {"three"}),
])
def test_items_of_a_list_that_stay_keep_their_comments(typed, gone, come):
    changed = form.change(LISTED, "sample", "prompts", "\n".join(typed))
    assert form.values_of(changed)["sample"]["prompts"] == typed
    for word, comment in (("one", "# first"), ("two", "# second"), ("three", "# third")):
        assert (f'"{word}",' in changed and comment in changed) or word in gone
