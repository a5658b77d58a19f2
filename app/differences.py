"""What a preset has otherwise than the shipped one that it comes nearest to, and the way back."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from app import form
from app.form import Values
from trainer import preset, schema
from trainer.errors import UserError

SHOWN = 200  # letters of a value


def of(values: Values | None, chosen: str, folder: Path) -> dict[str, Any]:
    """The differences from the shipped preset `chosen`, or from the nearest one: where, now, shipped.

    folder: what paths in the preset are relative to.
    """
    names = shipped()
    if values is None or not names:
        return {"reference": chosen if chosen in names else "", "differences": []}
    if chosen not in names:
        chosen = min(names, key=lambda name: _distance(values, name, folder))
    here, there = _whole(values, folder), _whole(_values(chosen), preset.SHIPPED)
    found = [{"where": where, "now": _words(here[where]), "shipped": _words(there[where])}
             for where in there if here[where] != there[where]]
    return {"reference": chosen, "differences": found}


def take_back(text: str, section: str, key: str, reference: str, folder: Path) -> str:
    """The text with one setting as in the shipped preset `reference`; left out when it is left out there."""
    if section not in schema.SECTIONS or key not in schema.SECTIONS[section].model_fields:
        raise UserError(f"there is no setting {section}.{key}")
    if reference not in shipped():
        raise UserError(f"there is no shipped preset {reference[:100]!r}")
    values = form.values_of(text)
    if values is None:
        raise UserError("the text is not valid TOML; mend it first")
    source = preset.read_text(preset.SHIPPED / f"{reference}.toml")
    if folder != preset.SHIPPED:
        source = form.settled(source, preset.SHIPPED)
    value: Any = (form.values_of(source) or {}).get(section, {}).get(key)
    now = values.get(section, {}).get(key)
    if isinstance(value, dict) and isinstance(now, dict):
        value = dict.fromkeys(now) | value  # what only the present table has goes
    return preset.update_text(text, {section: {key: value}})


def shipped() -> list[str]:
    """Names of the presets that come with the program."""
    return sorted((path.stem for path in preset.SHIPPED.glob("*.toml")), key=str.lower)


def _distance(values: Values, name: str, folder: Path) -> tuple[bool, int, str]:
    """How far a preset is from a shipped one: the same kind of base model first, then few differences."""
    here, there = _whole(values, folder), _whole(_values(name), preset.SHIPPED)
    return here["model.family"] != there["model.family"], sum(here[where] != there[where] for where in there), name


def _values(name: str) -> Values:
    file = preset.SHIPPED / f"{name}.toml"
    return _read(file, file.stat().st_mtime_ns)


@cache
def _read(file: Path, changed: int) -> Values:
    return form.values_of(preset.read_text(file)) or {}


def _whole(values: Values, folder: Path) -> dict[str, Any]:
    """Each setting's value, its default where none is given; paths as they are meant."""
    found = {}
    for section, key, default, follows in _settings():
        value = values.get(section, {}).get(key, default)
        if not follows:
            found[f"{section}.{key}"] = form.as_meant(value, folder) if schema.has_path(section, key) else value
    return found


@cache
def _settings() -> tuple[tuple[str, str, Any, bool], ...]:
    return tuple((item["section"], item["key"], item["default"], "follows" in item) for item in form.describe())


def _words(value: Any) -> str:  # noqa: ANN401
    """A value as the form shows it, short."""
    if value is None or value in ("", []):
        return "left out"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        value = ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
