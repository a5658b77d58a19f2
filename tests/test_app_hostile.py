"""Every function that the page can call, given what no page would send: it refuses in a sentence, and touches nothing
that is not the app's.

Walks whatever the tabs register, so a new function is held to it from its first line.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from app import ui
from app.components import FAULT, Answer, OwnComponent, Request
from app.jobs import Jobs
from app.paths import Places, can_be_sent
from tests.data_sets import draw, tree
from tests.run_folders import PRESET, finished

SECRET = "the-secret-of-another-user"
JUNK: list[Any] = [None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**400, "", "x", "../x", "/etc/passwd",
                   "a\0b", "\ud800", "x" * 10**6, [], ["../x"], [[[[]]]], {"path": "/etc/passwd"}, {"__proto__": {}},
                   b"bytes"]
TAKING_AWAY = ("rename", "delete", "move", "send", "empty", "undo", "redo", "restore")  # last
NESTED: Any = "x"
for _ in range(200):
    NESTED = [NESTED]
JUNK.append(NESTED)
JUNK.append("a = " + "[" * 50_000)  # TOML, too deep to be read


class World(NamedTuple):
    """A workspace with something of everything, beside it what belongs to somebody else, and the page over them."""

    places: Places
    others: Path
    functions: dict[str, Callable[[Any], Answer]]
    started: list[list[str]]  # commands


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    top = tmp_path
    others, workspace = top / "others", top / "workspace"
    draw(others / "private/a.png", caption=SECRET)
    (others / "private.toml").write_text(PRESET.replace("pictures", SECRET))
    (others / "run").mkdir()
    for name in ("preset.toml", "events.jsonl", "trainer.log", "run.safetensors"):
        (others / "run" / name).write_text(PRESET + f"# {SECRET}\n" if name == "preset.toml" else SECRET)
    for name in ("a.png", "b.png"):
        draw(workspace / "datasets/cats" / name, caption="a cat")
    finished(workspace, "r", validation=0.2)
    (workspace / "presets").mkdir()
    (workspace / "presets/p.toml").write_text(PRESET)
    draw(top / "root/birds/a.png", caption="a bird")
    (top / "root/link").symlink_to(others / "private")
    for folder in ("root", "workspace/datasets", "workspace/runs", "workspace/presets"):  # names that are no text
        shutil.copytree(top / "root/birds", top / folder / "caf\udce9")
    for file in ("root/\udce9.safetensors", "workspace/datasets/cats/\udce9.png", "workspace/presets/\udce9.toml",
                 "workspace/runs/r/exports/\udce9.safetensors", "workspace/exports/\udce9.safetensors",
                 "workspace/runs/caf\udce9/preset.toml"):
        (top / file).parent.mkdir(exist_ok=True)
        (top / file).write_text(PRESET)
    for link, goal in (("datasets/link", "private"), ("presets/link.toml", "private.toml"), ("runs/link", "run"),
                       ("datasets/cats/link", "private"), ("runs/r/samples", "private")):
        (workspace / link).symlink_to(others / goal)
    patch, started = pytest.MonkeyPatch(), []

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append([str(part) for part in command])
        return subprocess.Popen([sys.executable, "-c", ""], **options)

    patch.setattr("trainer.detached.subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL,
                                                                STDOUT=subprocess.STDOUT))
    places = Places(workspace, (top / "root",))
    page = ui.build(Jobs(places))
    functions = {f"{type(block).__name__}.{function.__name__}": function for block in page.blocks.values()
                 if isinstance(block, OwnComponent) for function in block.server_fns}
    order = sorted(functions, key=lambda name: any(word in name for word in TAKING_AWAY))
    yield World(places, others, {name: functions[name] for name in order}, started)
    patch.undo()


def fair(world: World, function: Callable[[Any], Answer]) -> dict[str, Any]:
    """A request as a page sends it, as far as its schema and the names that there are tell."""
    schema = function.request.model_json_schema()
    sets, files = ids(world, "DataSets.list_sets"), ids(world, "Exports.list_files")
    id = files[0] if function in [world.functions[name] for name in world.functions if name.startswith("Exports.")
                                  ] else next(id for id in sets if id.endswith(":cats"))
    known = {"id": id, "ids": files[:1] * 2, "weights": [0.5, 0.5], "base": "demo:base", "run": "r",
             "shelf": "own", "text": PRESET, "runs": ["r"], "names": ["a.png"], "images": ["a.png"]}
    request = {}
    for name, field in schema.get("properties", {}).items():
        request[name] = known[name] if name in known else value_of(field, schema)
    if "name" in request:
        request["name"] = "a.png" if "id" in request else "p"
    return request


def value_of(field: dict[str, Any], schema: dict[str, Any]) -> Any:
    """The plainest value of a JSON schema."""
    if "$ref" in field:
        return value_of(schema["$defs"][field["$ref"].rpartition("/")[2]], schema)
    for choice in ("anyOf", "oneOf"):
        if choice in field:
            return value_of(field[choice][0], schema)
    if "const" in field or "enum" in field:
        return field.get("const", field.get("enum", [None])[0])
    kind = field.get("type")
    if kind == "object":
        return {name: value_of(inner, schema) for name, inner in field.get("properties", {}).items()}
    if kind == "array":
        return [value_of(field["items"], schema)] * field.get("minItems", 1)
    plain = {"string": "1", "integer": int(field.get("minimum", 1)), "number": 0.5, "boolean": False, "null": None}
    return plain[kind] if kind in plain else "1"


def ids(world: World, listing: str) -> list[str]:
    """Ids of what there is."""
    return list(found_ids(world.functions[listing]({})))


def found_ids(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("id"), str):
            yield value["id"]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from found_ids(inner)


def ways_out(world: World) -> list[str]:
    """Names that lead to what belongs to others."""
    plain = ["link", "link/a.png", "../link", "..", ".", "../../others/private", "../../others/run", "r/samples/a.png",
             "samples/a.png", "..\\..\\others", "%2e%2e/%2e%2e/others/private", "~", "C:\\others",
             *(str(path) for path in (world.others / "private", world.others / "private/a.png",
                                      world.others / "private.toml", world.others / "run/run.safetensors"))]
    there = ids(world, "DataSets.list_sets") + ids(world, "Exports.list_files")
    places = {name.partition(":")[0] for name in there} | {"made", "0"}
    return plain + [f"{place}:{name}" for place in sorted(places) for name in plain]


def ask(name: str, function: Callable[[Any], Answer], request: Any) -> Answer:
    """Call it; whatever comes must be an object that JSON knows, and tell nothing of others."""
    answer = function(request)
    assert isinstance(answer, dict), (name, request)
    text = json.dumps(answer, allow_nan=False, ensure_ascii=False,
                      default=lambda value: pytest.fail(f"{name}: {value!r} is not JSON"))
    assert can_be_sent(text), (name, request, text[:300])
    assert SECRET not in text and "Traceback" not in text and FAULT not in text, (name, request, text[:300])
    if "error" in answer:
        assert isinstance(answer["error"], str) and 0 < len(answer["error"]) < 3000, (name, request)
    return answer


def is_refused_by(model: type[Request], request: Any) -> bool:
    try:
        model.model_validate(request)
    except ValidationError:
        return True
    return False


@pytest.fixture
def nothing_of_others_changes(world: World) -> Iterator[None]:
    """Files of others stay as they are, none is handed out, and no program is started on them."""
    before = tree(world.others)
    world.started.clear()
    yield
    assert tree(world.others) == before
    assert not [command for command in world.started if any(str(world.others) in part for part in command)]
    inside = world.places.workspace.resolve()
    assert all(inside in Path(path).resolve().parents for path in world.places.handed_out)


def test_every_function_says_what_it_takes_and_takes_nothing_more(world):
    assert len(world.functions) > 50
    for name, function in world.functions.items():
        model = function.request
        assert issubclass(model, Request) and model.model_config["extra"] == "forbid" and model.model_config["strict"]
        assert not hasattr(OwnComponent, function.__name__), f"{name} would hide a part of the component"
        assert "error" in ask(name, function, fair(world, function) | {"more": 1})


def test_what_is_no_request_at_all_is_refused(world, nothing_of_others_changes):
    for (name, function), junk in itertools.product(world.functions.items(), JUNK):
        assert set(ask(name, function, junk)) == {"error"}, (name, junk)


def test_a_request_without_one_of_its_parts_is_refused(world, nothing_of_others_changes):
    for name, function in world.functions.items():
        whole = fair(world, function)
        for part in function.request.model_json_schema().get("required", []):
            assert set(ask(name, function, {key: value for key, value in whole.items() if key != part})) == {"error"}


def test_one_part_of_a_wrong_kind_is_refused_and_a_strange_one_does_no_harm(world, nothing_of_others_changes):
    wrong = 0
    for name, function in world.functions.items():
        whole = fair(world, function)
        for part, junk in itertools.product(whole, JUNK):
            request = whole | {part: junk}
            answer = ask(name, function, request)
            if is_refused_by(function.request, request):
                wrong += 1
                assert set(answer) == {"error"}, (name, part, junk)
    assert wrong > 1000


def test_fair_requests_are_understood(world):
    """Else the tests below would be of nothing."""
    answers = {name: function(fair(world, function)) for name, function in world.functions.items()}
    assert not [name for name, function in world.functions.items()
                if is_refused_by(function.request, fair(world, function))]
    fine = {name.partition(".")[2] for name, answer in answers.items() if "error" not in answer}
    assert fine >= {"list_runs", "read_run", "read_hard", "save_notes", "resume_run", "list_sets", "read_info",
                    "list_images", "read_cards", "read_large", "read_mask", "exclude_images", "delete_images",
                    "check_health", "open_preset",
                    "list_files", "start_check",
                    "list_compared", "read_compared", "make_report", "make_card", "plan_sweep", "start_sweep"}, answers


def test_no_name_leads_to_what_belongs_to_others(world, nothing_of_others_changes):
    """Each text of each request in turn, and each text of its lists and objects."""
    outs = ways_out(world)
    for name, function in world.functions.items():
        whole = fair(world, function)
        for out in outs:
            for part, value in whole.items():
                if isinstance(value, str):
                    ask(name, function, whole | {part: out})
                elif isinstance(value, list) and value:
                    inner = [item | dict.fromkeys(item, out) if isinstance(item, dict) else out for item in value]
                    ask(name, function, whole | {part: inner})
                elif isinstance(value, dict):
                    ask(name, function, whole | {part: value | {key: out for key in value
                                                                if isinstance(value[key], str)}})


    assert sorted(path.name for path in world.places.workspace.parent.iterdir()) == ["others", "root", "workspace"]
    assert {name for name in tree(world.places.roots[0]) if can_be_sent(name)} == {"birds/a.png", "birds/a.txt"}
