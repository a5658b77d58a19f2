"""A preset as a form: what the schema says of each setting, and a text's values and faults beside it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomlkit
from pydantic.fields import FieldInfo

from app.labels import LABELS, SECTIONS
from trainer import preset, schema
from trainer.errors import UserError

Values = dict[str, dict[str, Any]]

# The settings that most people touch, in the order in which they think of them.  All others are folded away.
MAIN = ("model.family", "model.base", "data.folder", "data.trigger", "data.resolution", "adapter.method",
        "adapter.rank", "adapter.alpha", "train.steps", "train.batch_size", "train.lr", "sample.prompts",
        "sample.every", "evaluate.folder", "output.save_every")
RATES = {("train", "lr"): (("adapter", "method"), schema.METHOD_LR)}  # may be a table: by which setting, and its values


def describe() -> list[dict[str, Any]]:
    """Each setting for the browser: section, key, label, help, kind, limits, default; the `main` ones first."""
    others = [f"{section}.{key}" for section in schema.SECTIONS for key in schema.fields(section)]
    pairs = (name.split(".") for name in (*MAIN, *(name for name in others if name not in MAIN)))
    return [_describe(section, key, schema.SECTIONS[section].model_fields[key])
            | {"main": f"{section}.{key}" in MAIN, "group": SECTIONS[section]} for section, key in pairs]


def describe_section(name: str, model: type[schema.Section]) -> list[dict[str, Any]]:
    """The same of each setting of a section that is in no preset, with what is folded away marked as `advanced`."""
    return [_describe(name, key, field) | {"advanced": bool(_extra(field).get("advanced"))}
            for key, field in model.model_fields.items()]


def state_of(text: str, name: str) -> dict[str, Any]:
    """A text's values as far as it can be read, and its faults, worded as on the command line."""
    problems: list[dict[str, Any]] = []
    try:
        preset.parse(text, name)
    except UserError as error:
        problems = [_problem(line, name) for line in str(error).splitlines()]
    return {"values": values_of(text), "problems": problems}


def values_of(text: str) -> Values | None:
    """The values that a text gives, section by section; None while it is not TOML."""
    try:
        data = preset.read_toml(text, "preset")
    except UserError:
        return None
    sections = {name: section for name, section in data.items() if isinstance(section, dict)}
    return {name: {key: _plain(value) for key, value in section.items()} for name, section in sections.items()}


def change(text: str, section: str, key: str, value: Any) -> str:
    """The text with one setting changed to what was typed in the form; "" takes it out.

    What does not fit the setting is put down as it was typed, so that the check says what is wrong with it.
    """
    if section not in schema.SECTIONS or key not in schema.SECTIONS[section].model_fields:
        raise UserError(f"there is no setting {section}.{key}")
    field = schema.SECTIONS[section].model_fields[key]
    if _extra(field).get("follows"):
        raise UserError(f"{section}.{key} follows {_extra(field)['follows']} and cannot be set")
    values = values_of(text)
    if values is None:
        raise UserError("the text is not valid TOML; mend it first")
    typed = _typed(_kind(field), value)
    if (section, key) in RATES and isinstance(values.get(section, {}).get(key), dict):
        typed = {_method(values): typed}  # the other methods keep their rates
    if isinstance(typed, list) and len(typed) == 1 and str in _members(field.annotation):
        typed = typed[0]  # a setting that is one folder or several
    return preset.update_text(text, {section: {key: typed}})


def _method(values: Values) -> str:
    """The method whose rate is edited: the text's, as far as it is one."""
    default = str(schema.Adapter.model_fields["method"].default)
    given = values.get("adapter", {}).get("method", default)
    return given if given in schema.METHOD_LR else default


def settled(text: str, folder: Path) -> str:
    """The text as it has to read in another folder: paths that were meant relative to `folder` are written out."""
    values = values_of(text) or {}
    moved: Values = {}
    for section, settings in values.items():
        for key, value in settings.items():
            known = section in schema.SECTIONS and key in schema.SECTIONS[section].model_fields
            if known and schema.has_path(section, key) and (there := as_meant(value, folder)) != value:
                moved.setdefault(section, {})[key] = there
    return preset.update_text(text, moved) if moved else text


def as_meant(value: Any, folder: Path) -> Any:  # noqa: ANN401
    """A path that is meant relative to `folder`, written out; all else as it is."""
    if isinstance(value, list):
        return [as_meant(item, folder) for item in value]
    is_relative = isinstance(value, str) and value and not Path(value).is_absolute()
    return str((folder / value).resolve()) if is_relative and (folder / value).exists() else value


def _describe(section: str, key: str, field: FieldInfo) -> dict[str, Any]:
    kind = _kind(field)
    described = {"section": section, "key": key, "label": _label(section, key),
                 "help": field.description or "", "kind": kind, "required": field.is_required(),
                 "default": None if field.is_required() else _plain(field.get_default()), **_limits(field)}
    if kind in ("choice", "several"):
        described["choices"] = list(_choices(field))
    if (section, key) in RATES:
        (other, setting), rates = RATES[section, key]
        first = schema.fields(other)[setting].default
        described |= {"by": [other, setting], "by_default": first, "rates": rates}
    if follows := _extra(field).get("follows"):
        described["follows"] = follows
    return described


def _label(section: str, key: str) -> str:
    return LABELS.get(f"{section}.{key}", key.replace("_", " ").capitalize())


def _kind(field: FieldInfo) -> str:
    """How a setting is drawn: choice, several (of them), bool, int, float, text, path, lines (a list, one a line)."""
    types = _members(field.annotation)
    if _choices(field):
        return "several" if list in types else "choice"
    if list in types:
        return "lines"
    if _extra(field).get("path"):
        return "path"
    plain = types - {type(None)}
    for kind, type_ in (("bool", bool), ("int", int), ("float", float), ("text", str)):
        if type_ in plain:
            return kind
    raise TypeError(f"no way to draw {field.annotation}")


def _choices(field: FieldInfo) -> tuple[Any, ...]:
    """What a setting, or each item of its list, may be."""
    inner = get_args(field.annotation)[0] if get_origin(field.annotation) is list else field.annotation
    return get_args(inner) if get_origin(inner) is Literal else ()


def _members(annotation: Any) -> set[Any]:
    """The plain types in an annotation: `str | list[str]` is {str, list}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*(_members(item) for item in get_args(annotation)))
    return {origin or annotation}


def _limits(field: FieldInfo) -> dict[str, Any]:
    names = {"ge": "min", "gt": "above", "le": "max", "lt": "below", "multiple_of": "step"}
    return {shown: getattr(limit, name) for limit in field.metadata for name, shown in names.items()
            if hasattr(limit, name)}


def _typed(kind: str, value: Any) -> Any:
    """What was typed, as the setting's type where it can be read so."""
    if isinstance(value, bool) or not isinstance(value, str):
        return value
    text = value.strip()
    if kind in ("lines", "several"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines or None
    if not text:
        return None
    if kind == "int" and re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    if kind == "float":
        try:
            return tomlkit.value(text) if re.fullmatch(r"[+-]?\d+(\.\d+)?[eE][+-]?\d+", text) else float(text)
        except ValueError:
            return text
    return text


def _problem(message: str, name: str) -> dict[str, Any]:
    """A message of the check, with the line and the setting that it speaks of."""
    match = re.match(rf"{re.escape(name)}:(\d+): (?:([a-z_]+(?:\.\w+)?): )?", message)
    line = int(match.group(1)) if match else None
    where = match.group(2) if match else None
    if not match and (found := re.match(rf"{re.escape(name)}: ([a-z_]+\.\w+): ", message)):
        where = found.group(1)
    return {"text": message, "line": line, "where": where}


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _plain(value: Any) -> Any:
    """A value that JSON and a browser have a word for: dates, NaN and huge numbers are written out."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    has_word = isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 2**53
    return value if has_word else str(value)
