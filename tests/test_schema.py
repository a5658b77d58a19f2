"""The table of settings: whole, documented, and right by itself; and the presets that come with the program."""

import re
import typing

import pytest
from pydantic import ValidationError

from trainer import preset, schema

SHIPPED = sorted(preset.SHIPPED.glob("*.toml"))
SETTINGS = [(section, key) for section in schema.SECTIONS for key in schema.fields(section)]


def test_the_sections_that_others_rely_on_are_there():
    assert set(schema.SECTIONS) >= {"model", "data", "adapter", "train", "sample", "evaluate", "output", "log"}
    assert {("model", "family"), ("model", "base"), ("data", "folder"), ("adapter", "method"), ("adapter", "rank"),
            ("train", "steps"), ("train", "batch_size"), ("train", "grad_accum"),
            ("log", "rank_every")} <= set(SETTINGS)


@pytest.mark.parametrize("section, key", SETTINGS)
def test_every_setting_has_a_help_text_that_reads_as_a_sentence(section, key):
    text = schema.fields(section)[key].description
    assert text and text == text.strip() and re.search(r"[.)]$", text), text


@pytest.mark.parametrize("name", schema.SECTIONS)
def test_every_default_keeps_its_own_limits(name):
    model = schema.SECTIONS[name]
    defaults = {key: field.default for key, field in model.model_fields.items()
                if not field.is_required() and (name, key) != ("adapter", "alpha")}
    needed = {key: next(iter(typing.get_args(field.annotation)), "x") if key == "family" else "x"
              for key, field in model.model_fields.items() if field.is_required()}
    model.model_validate(defaults | needed)


def test_every_method_has_an_optimizer_a_rate_and_its_choices():
    methods = set(typing.get_args(schema.Method))
    for table in (schema.METHOD_OPTIMIZER, schema.METHOD_LR, schema.METHOD_INITS, schema.METHOD_RETRACTIONS,
                  schema.METHOD_OPTIMIZERS):
        assert set(table) == methods
    for method in methods:
        assert schema.METHOD_OPTIMIZER[method] in schema.METHOD_OPTIMIZERS[method]


@pytest.mark.parametrize("table, section, key", [
    (schema.METHOD_INITS, "adapter", "init"), (schema.METHOD_RETRACTIONS, "adapter", "retraction"),
    (schema.METHOD_OPTIMIZERS, "train", "optimizer")])
def test_every_choice_belongs_to_a_method(table, section, key):
    choices = set(typing.get_args(schema.fields(section)[key].annotation))
    assert choices - {"auto"} == {choice for allowed in table.values() for choice in allowed}


def test_a_preset_cannot_be_changed_by_those_who_read_it():
    with pytest.raises(ValidationError, match="frozen"):
        schema.Log().every = 2


def test_paths_are_marked():
    assert {place for place in SETTINGS if schema.has_path(*place)} >= {
        ("model", "base"), ("data", "folder"), ("evaluate", "folder")}
    assert not schema.has_path("output", "title")


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_preset_loads_and_opens_with_its_command(path):
    got = preset.load(path)
    assert preset.parse(preset.dumps(got), path.name) == got
    opening = path.read_text(encoding="utf-8").partition("\n[")[0]
    assert re.search(rf"^# +python -m trainer --preset (presets/)?{re.escape(path.name)}\b", opening, re.M)


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
@pytest.mark.parametrize("method", schema.METHOD_LR)
def test_every_shipped_preset_takes_every_method(path, method):
    got = preset.load(path, [f"adapter.method={method}", "adapter.init=default", "adapter.retraction=default",
                             "adapter.dora=false", "train.optimizer=auto"])
    assert got.adapter.method == method
