"""Reads a preset, checks it whole, and writes it back without losing a comment."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from tomlkit.items import Array

from trainer import schema
from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.preset_rules import RULES
from trainer.schema import Preset, Problem

OF_A_RUN = "preset.toml"  # what it is called in each run's folder
SHIPPED = Path(__file__).resolve().parent.parent / "presets"
LENGTH = {("train", "steps"), ("train", "epochs")}
HOLDOUT = ("evaluate", "holdout")  # it takes images out of training: not for a resume to change
ALPHA_REASON = ("the scale alpha/rank would change what the learning rate means, and both manifold methods "
                "need scale 1")
MOST_DOTS = 8  # of a key; a preset has one
QUOTED = re.compile(r"""\"{3}|'{3}|\"(?:[^"\\]|\\.)*(?:"|$)|'[^']*(?:'|$)|#.*""")
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text in quotes",
         "list": "a list in brackets"}  # what pydantic calls otherwise


def find(name: str, workspace: Path) -> Path:
    """The preset file meant by `name`: as given, else in `presets/` and the workspace, with or without .toml."""
    for folder in (Path(), SHIPPED, workspace / "presets"):
        for candidate in (folder / name, folder / f"{name}.toml"):
            if candidate.is_file():
                return candidate.resolve()
    known = sorted({p.stem for folder in (SHIPPED, workspace / "presets") for p in folder.glob("*.toml")})
    raise UserError(f"no preset {name!r}: not a file here, nor in {SHIPPED} or {workspace / 'presets'}."
                    + _nearest(Path(name).stem, known) + (f" There are: {', '.join(known)}." if known else ""))


def load(path: Path, overrides: Iterable[str] = ()) -> Preset:
    """Read a preset file with `--set` overrides ("section.key=value").

    Paths are made absolute (against the preset's folder when they exist there, else the working directory) and what
    was left out is filled in, so that the result says all there is to say.  Raises `UserError` with every fault at
    once, as `file:line: section.key: what is wrong`.
    """
    text = read_text(path)
    name = f"{path.parent.name}/{path.name}" if path.name == OF_A_RUN else path.name
    return complete(parse(text, name, overrides), path.resolve().parent)


def parse(text: str, name: str, overrides: Iterable[str] = ()) -> Preset:
    """The checked preset of a TOML text; `name` stands in the messages."""
    data = read_toml(text, name)
    typed = {_override(item)[0]: item for item in overrides}
    given = dict(_override(item) for item in overrides)
    problems = [Problem(f".{key}", "stands outside of a section; write it as section.key")
                for key, value in data.items() if not isinstance(value, dict) and key != "version"]
    try:
        data = migrate(data)
    except UserError as error:
        raise UserError(_line(Problem(".version", str(error)), text, name, typed)) from None
    data.pop("version")
    sections = {key: dict(value) for key, value in data.items() if isinstance(value, dict)}
    for (section, key), value in given.items():
        sections.setdefault(section, {})[key] = value
    for chosen, other in (("steps", "epochs"), ("epochs", "steps")):  # --set replaces the one length by the other
        if ("train", chosen) in given and ("train", other) not in given:
            sections.get("train", {}).pop(other, None)
    preset, found = check(sections)
    problems += found
    if problems or preset is None:
        raise UserError("\n".join(_line(problem, text, name, typed) for problem in problems))
    return preset


def check(sections: Mapping[str, Mapping[str, Any]]) -> tuple[Preset | None, list[Problem]]:
    """Check sections of plain values; all problems at once, and the preset when there is none."""
    problems = [Problem(name, "no such section." + _nearest(name, schema.SECTIONS))
                for name in sections if name not in schema.SECTIONS]
    checked: dict[str, Any] = {}
    for name, model in schema.SECTIONS.items():
        values = dict(sections.get(name, {}))
        problems += _check_alpha(values) if name == "adapter" else []
        try:
            checked[name] = model.model_validate(values)
        except ValidationError as error:
            problems += found_in(name, model, error)
    problems += [problem for rule in RULES for problem in rule(checked)]
    return (None if problems else Preset(**checked)), list(dict.fromkeys(problems))


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """Bring the data of an older schema up to date; refuse one from the future.

    A preset without a version may be of any: it goes through all migrations, which leave newer spellings alone.
    """
    version = data.get("version", schema.SCHEMA_VERSION)
    if not isinstance(version, int) or not 1 <= version <= schema.SCHEMA_VERSION:
        raise UserError(f"this preset has version {version!r}, and this program knows 1 to "
                        f"{schema.SCHEMA_VERSION}; update the program, or take the line out")
    for change in MIGRATIONS[(version if "version" in data else 1) - 1:]:
        data = change(data)
    return data | {"version": schema.SCHEMA_VERSION}


def _checkpointing_has_names(data: dict[str, Any]) -> dict[str, Any]:
    """1 -> 2: memory.gradient_checkpointing was true or false."""
    memory = data.get("memory")
    old = memory.get("gradient_checkpointing") if isinstance(memory, dict) else None
    if not isinstance(old, bool):
        return data
    return data | {"memory": memory | {"gradient_checkpointing": "full" if old else "none"}}


# One function for each version of the schema but the last: it makes data of the next version of it.
MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_checkpointing_has_names,)


def complete(preset: Preset, folder: Path) -> Preset:
    """Fill in what follows from the rest: the method's optimizer and rate, the family's guidance, absolute paths."""
    method = preset.adapter.method
    lr, optimizer, momentum = preset.train.lr, preset.train.optimizer, preset.train.momentum
    if not isinstance(lr, float):
        lr = (lr or {}).get(method, schema.METHOD_LR[method])
    optimizer = schema.METHOD_OPTIMIZER[method] if optimizer == "auto" else optimizer
    momentum = schema.OPTIMIZER_MOMENTUM.get(optimizer) if momentum is None else momentum
    guidance = preset.sample.guidance
    guidance = schema.FAMILY_GUIDANCE[preset.model.family] if guidance is None else guidance
    updates: dict[str, dict[str, Any]] = {
        "train": {"lr": lr, "optimizer": optimizer, "momentum": momentum}, "sample": {"guidance": guidance}}
    for section, model in schema.SECTIONS.items():
        for key in model.model_fields:
            if schema.has_path(section, key):
                value = getattr(getattr(preset, section), key)
                updates.setdefault(section, {})[key] = _absolute(value, folder, hub=section == "model")
    return preset.model_copy(update={
        name: getattr(preset, name).model_copy(update=values) for name, values in updates.items()})


def dumps(preset: Preset) -> str:
    """The preset as TOML with every value written out."""
    document = tomlkit.document()
    document["version"] = preset.version
    for name in schema.SECTIONS:
        values = getattr(preset, name).model_dump(exclude_none=True)
        table = tomlkit.table()
        for key, value in values.items():
            table[key] = value
        document[name] = table
    return tomlkit.dumps(document)


def update_text(text: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """`text` with the given values set: only what differs is touched, so comments, order and spelling stay.

    A value of None takes the key out; of a list only the items that differ change, of a table only the keys named.
    """
    _refuse_deep_keys(text, "preset")
    document = tomlkit.parse(text)
    before = document.unwrap()
    for name, values in sections.items():
        table, old = document.get(name), before.get(name, {})
        for key, value in values.items():
            if value is None:
                if table is not None and key in table:
                    del table[key]
                continue
            if table is None:
                table = document[name] = tomlkit.table()
                table = document[name]
            if key not in old or old[key] != value or type(old[key]) is not type(value):
                _put(table, key, value)
    return tomlkit.dumps(document)


def _put(table: Any, key: str, value: Any) -> None:  # noqa: ANN401
    """Set one value of a document."""
    old = table.get(key)
    if isinstance(value, Mapping) and isinstance(old, Mapping):
        for name, item in value.items():
            if item is None:
                old.pop(name, None)
            elif old.get(name) != item:
                old[name] = item
    elif isinstance(value, Mapping):
        table[key] = tomlkit.inline_table()
        table[key].update({name: item for name, item in value.items() if item is not None})
    elif isinstance(value, list) and isinstance(old, Array):
        _merge(old, value)
    else:
        table[key] = value


def _merge(array: Array, items: list[Any]) -> None:
    """Make an array's items these, keeping those that both begin or end with, and their comments."""
    before = array.unwrap()
    same = next((n for n, (old, new) in enumerate(zip(before, items)) if old != new), min(len(before), len(items)))
    rest = min(len(before), len(items)) - same
    end = next((n for n in range(rest) if before[-1 - n] != items[-1 - n]), rest)
    middle = items[same:len(items) - end]
    gone = len(before) - end - same
    for number, item in enumerate(middle[:gone]):
        array[same + number] = item
    for _ in range(gone - len(middle)):
        del array[same + len(middle)]
    for number, item in enumerate(middle[gone:], same + gone):
        array.insert(number, item)


def save(path: Path, text: str) -> None:
    """Write a preset's text atomically, after checking it; a faulty one is refused and the file stays."""
    parse(text, path.name)
    write_atomic(path, text.encode())


def check_resume(before: Preset, after: Preset) -> None:
    """Refuse a resume that changes what the past steps were made with."""
    changed = []
    for name in schema.SECTIONS:
        old, new = getattr(before, name), getattr(after, name)
        changed += [f"{name}.{key}" for key in type(old).model_fields
                    if getattr(old, key) != getattr(new, key) and (name, key) not in LENGTH
                    and (name not in schema.RESUMABLE or (name, key) == HOLDOUT)]
    if changed:
        raise UserError(f"a resume may change only train.steps, sample, evaluate and log, not {', '.join(changed)}; "
                        "start a new run with the changed preset instead")


def read_text(path: Path) -> str:
    """A preset's text; a plain message for a file that cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")  # as bytes, so that Windows line ends stay as they are
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _refuse_deep_keys(text: str, name: str) -> None:
    """A key of thousands of parts would keep the TOML reader busy for minutes.

    Texts in quotes and comments do not count; what stands in a text of several lines may, if it looks like such a key.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MOST_DOTS:
            bare = " ".join(QUOTED.sub("x", line).split()).replace(" .", ".").replace(". ", ".")
            if any(part.count(".") > MOST_DOTS for part in re.split(r"[^\w.-]|\.\.+", bare)):
                raise UserError(f"{name}:{number}: a key of more than {MOST_DOTS + 1} parts; a preset has two levels: "
                                "write key = value below a [section]")


def read_toml(text: str, name: str) -> dict[str, Any]:
    """The plain values of a TOML text, whatever they are.  `UserError` for one that is not TOML, or goes too deep."""
    _refuse_deep_keys(text, name)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{name}: its values lie too deep inside each other to be read; a preset needs two levels"
                        ) from None
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"\(at line (\d+), column \d+\)|at end of document", str(error))
        line = match.group(1) if match and match.group(1) else str(text.count("\n") + 1)
        what = str(error).split(" (at ")[0]
        hint = "; write Windows paths with / or in 'single quotes'" if re.search("Unescaped|hex value", what) else ""
        raise UserError(f"{name}:{line}: not valid TOML: {what}{hint}") from None


def _override(item: str) -> tuple[tuple[str, str], Any]:
    """"section.key=value", the value as a TOML literal or else a plain string."""
    name, equals, literal = item.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key) or "." in key:
        raise UserError(f"--set {item}: write it as section.key=value, for example --set train.lr=1e-4")
    try:
        return (section, key), read_toml(f"v = {literal}", "--set")["v"]
    except UserError:
        return (section, key), literal.strip()


def _check_alpha(values: dict[str, Any]) -> list[Problem]:
    """alpha is derived from rank; one that says otherwise is refused."""
    rank = values.get("rank", schema.Adapter.model_fields["rank"].default)
    alpha = values.pop("alpha", 0)
    if isinstance(rank, int) and not isinstance(rank, bool):
        values["alpha"] = rank
    if alpha in (0, rank) and not isinstance(alpha, bool):
        return []
    return [Problem("adapter.alpha", f"alpha must equal rank ({rank}), not {alpha!r}; leave it out ({ALPHA_REASON})")]


def found_in(section: str, model: type[schema.Section], error: ValidationError) -> list[Problem]:
    """The problems of one section, one a setting.

    A union complains once a member: the one that came furthest is what was meant.
    """
    by_key: dict[Any, list[Any]] = {}
    for item in error.errors():
        by_key.setdefault(item["loc"][:1], []).append(item)
    furthest = [max(items, key=lambda item: (len(item["loc"]), not item["type"].endswith("_type")))
                for items in by_key.values()]
    return [_problem(section, model, item) for item in furthest]


def _problem(section: str, model: type[schema.Section], item: Any) -> Problem:
    key = str(item["loc"][0]) if item["loc"] else ""
    where = f"{section}.{key}" if key else section
    if item["type"] == "extra_forbidden":
        return Problem(where, "no such key." + _nearest(key, model.model_fields))
    if item["type"] == "no_switch":
        return Problem(where, item["msg"])
    if item["type"] == "missing":
        return Problem(where, "is missing. " + (model.model_fields[key].description or ""))
    inner = f" (item {item['loc'][-1] + 1})" if isinstance(item["loc"][-1], int) else ""
    message = re.sub(r"^(Input|List|String) should", "should", item["msg"])
    message = re.sub(r" after validation, not \d+$", "", message)
    kind = item["type"].split("_")[0]
    if kind in TYPES and item["type"].endswith(("_type", "_parsing", "_from_float")):
        message = f"should be {TYPES[kind]}"
    if item["type"] == "string_pattern_mismatch":
        message = f"should be one of these: {model.model_fields[key].description}".rstrip(".")
    choices = _nearest(item["input"], re.findall(r"'([^']+)'", message)) if item["type"] == "literal_error" else ""
    return Problem(where, f"{message}{inner}, not {item['input']!r}.{choices}")


def _line(problem: Problem, text: str, name: str, typed: Mapping[tuple[str, str], str]) -> str:
    """The problem with its place: `--set …` as it was typed, or file and line (".key" stands before any section)."""
    section, _, key = problem.where.partition(".")
    line = _find_line(text, section, key)
    for place, item in typed.items():
        if place == (section, key) or (place[0] == section and not key and line is None):
            return f"--set {item}: {problem.text}"
    place = f"{name}:{line}" if line else name
    return f"{place}: {problem.where.lstrip('.')}: {problem.text}"


def _find_line(text: str, section: str, key: str) -> int | None:
    """Where `key` stands, else its section's head: presets have exactly two levels, so a scan finds it."""
    current, head = "", None
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            current = match.group(1)
            head = number if current == section else head
        elif current == section and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return head


def _nearest(word: object, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(word), [str(item) for item in known], n=1, cutoff=0.55)
    return f" Did you mean {matches[0]}?" if matches else ""


def _absolute(value: str | list[str], folder: Path, hub: bool) -> str | list[str]:
    """A path made absolute; a hub id (nothing of that name on the disk, not written as a path) stays as it is."""
    if isinstance(value, list):
        return [str(_absolute(item, folder, hub)) for item in value]
    if not value:
        return value
    path = Path(value).expanduser()
    for base in (folder, Path.cwd()):
        if (base / path).exists():
            return str((base / path).resolve())
    is_hub_id = hub and re.fullmatch(r"\w[\w.-]*/[\w.-]+", value) is not None
    return value if is_hub_id else str((Path.cwd() / path).absolute())

