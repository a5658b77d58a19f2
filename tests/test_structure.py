"""The house keeps its shape: imports point one way, light modules stay light, files and functions stay short,
and requirements stay exact.

Walks whatever is there, so a new file is held to the rules from its first line.
"""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("app", "trainer", "presets", "tests")
LIGHT = {f"trainer.{name}" for name in ("errors", "preset", "events", "run", "captions", "data.folders",
                                         "data.buckets", "data.decoding", "data.order", "caption.task",
                                         "families.clip_merges", "shifts", "bases", "model_folders", "shell_bases",
                                         "families.header", "families.recognise", "families.folders", "export.header",
                                         "export.recognise", "export.texts", "facts", "comparison", "shell",
                                         "tryout.task", "tryout.origin",
                                         "shell_queue", "queue", "runner", "detached",
                                         "branch", "shelf", "notes", "best", "shell_shelf")}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "torchmetrics"}


def files(suffix: str, *tops: str) -> list[Path]:
    found = [path for top in tops for path in (ROOT / top).rglob(f"*{suffix}")]
    return sorted(path for path in found if "node_modules" not in path.parts)


def sources() -> list[Path]:
    return [ROOT / "launch.py", *files(".py", *TOPS)]


def name_of(path: Path) -> str:
    """The dotted name of a module: trainer/data/__init__.py is trainer.data."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in files(".py", "app", "trainer")}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_names(node: ast.AST, package: list[str]) -> list[str]:
    """Modules that one statement imports, inside a module of `package`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = package[: len(package) + 1 - node.level] if node.level else []
    source = ".".join([*above, *filter(None, [node.module])])
    # `from trainer import preset` imports trainer.preset; `from trainer.run import Run` imports trainer.run
    names = [f"{source}.{alias.name}" for alias in node.names]
    return [name if name in modules() else source for name in names]


@cache
def imports(importer: str) -> frozenset[str]:
    """Every module that one names, inside functions too."""
    path = modules()[importer]
    package = list(path.relative_to(ROOT).parent.parts)
    return frozenset(name for node in ast.walk(tree(path)) for name in imported_names(node, package))


def packages(names: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@cache
def light_modules() -> frozenset[str]:
    """The light modules and what they are made of."""
    found, open_ends = set(), [name for name in LIGHT if name in modules()]
    while open_ends:
        found.add(name := open_ends.pop())
        open_ends += [other for other in imports(name) if other in modules() and other not in found]
    return frozenset(found)


# What families stand on.
BASE = {f"trainer.{name}" for name in ("manifold", "manifold_kernel", "noise", "objective", "flow",
                                         "adapters.target")}


def layer(name: str) -> int:
    """How high a module stands in its half of the house; it may import its own height and below."""
    if name.endswith("__main__"):
        return 4
    if name.startswith("app"):
        return {"app.ui": 3}.get(name, 2 if name.startswith("app.tabs") else 1)
    if name == "trainer" or name in light_modules():
        return 0
    if name in BASE or name.startswith(("trainer.families", "trainer.quantize")):
        return 1
    return 3 if name == "trainer.loop" else 2


# Directions


@pytest.mark.parametrize(
    ("statement", "package", "names"),
    [
        ("import torch.nn", ["trainer"], ["torch.nn"]),
        ("from trainer import errors", ["app"], ["trainer.errors"]),
        ("from trainer.errors import UserError", ["app"], ["trainer.errors"]),
        ("from . import errors", ["trainer"], ["trainer.errors"]),
        ("from .. import errors", ["trainer", "data"], ["trainer.errors"]),
        ("from ..errors import UserError", ["trainer", "data"], ["trainer.errors"]),
    ],
)
def test_every_way_to_import_is_seen(statement, package, names):
    assert imported_names(ast.parse(statement).body[0], package) == names


@pytest.mark.parametrize(
    ("higher", "lower"),
    [
        ("trainer.__main__", "trainer.loop"),
        ("trainer.loop", "trainer.adapters.bank"),
        ("trainer.adapters.bank", "trainer.manifold"),
        ("trainer.families.sd15", "trainer.errors"),
        ("app.__main__", "app.ui"),
        ("app.ui", "app.tabs.train"),
        ("app.tabs.train", "app.jobs"),
    ],
)
def test_layers_stand_as_designed(higher, lower):
    assert layer(higher) > layer(lower)


def test_no_import_points_up():
    upward = [
        f"{name} imports {other}"
        for name in modules()
        for other in imports(name)
        if other in modules() and other.split(".")[0] == name.split(".")[0] and layer(other) > layer(name)
    ]
    assert not upward


def test_trainer_knows_nothing_of_the_app():
    assert not [
        name
        for name in modules()
        if name.startswith("trainer") and packages(imports(name)) & {"app", "gradio", "launch"}
    ]


def test_app_knows_only_the_light_part_of_the_trainer():
    for name in modules():
        if name.startswith("app"):
            used = {other for other in imports(name) if other.split(".")[0] == "trainer"}
            assert used <= light_modules(), name
            assert not packages(imports(name)) & HEAVY, name


def test_light_modules_exist_and_the_package_itself_is_empty():
    assert set(modules()) >= LIGHT
    assert (ROOT / "trainer/__init__.py").read_text().strip() == ""


def loaded_after_importing(names: list[str]) -> set[str]:
    program = f"import sys, {', '.join(names)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_light_modules_load_nothing_heavy():
    loaded = loaded_after_importing(sorted(light_modules()))
    assert "trainer" in loaded
    assert not loaded & (HEAVY | {"gradio", "app"})


@pytest.mark.skipif(not (ROOT / "app/ui.py").exists(), reason="no app here")
def test_the_app_loads_nothing_heavy():
    loaded = loaded_after_importing(sorted(name for name in modules() if name.startswith("app")))
    assert "gradio" in loaded
    assert not loaded & HEAVY


# Sizes and names


def test_no_file_is_longer_than_400_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources() + scripts()}
    assert not {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > 400}


def test_functions_are_shorter_than_60_lines_and_only_the_loop_has_80():
    long = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                is_loop = path == ROOT / "trainer/loop.py" and node.name == "train"
                lines = node.end_lineno - node.lineno + 1
                if lines > (80 if is_loop else 59):
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long


def test_no_file_is_a_drawer_for_odds_and_ends():
    assert not [path for path in sources() if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_every_module_says_what_it_is_for():
    silent = [path for path in sources() if tree(path).body and not ast.get_docstring(tree(path))]
    assert not [str(path.relative_to(ROOT)) for path in silent]


def test_the_environment_is_read_only_at_the_doors():
    """Settings come from the preset and the command line; os.environ only in launch.py and __main__."""
    readers = []
    for path in files(".py", "app", "trainer"):
        used = {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        if used & {"os.environ", "os.getenv"} and path.name != "__main__.py":
            readers.append(str(path.relative_to(ROOT)))
    assert not readers


def test_what_is_shipped_tells_no_folder_of_who_built_it():
    """diffusers writes down where a model was loaded from."""
    texts = {path: path.read_text("utf-8") for path in files(".json", "presets", "trainer")}
    assert texts and not [path for path, text in texts.items() if '"_name_or_path": "/' in text]


# The map


def test_the_trainers_map_names_its_folders_and_fast_parts_and_nothing_that_is_not_there():
    trainer, told = ROOT / "trainer", (ROOT / "trainer/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:[a-z]+/)?(\w+\.py|[a-z]+/)`", told))
    there = {path.name for path in trainer.rglob("*.py")} | {f"{path.parent.name}/" for path in trainer.rglob("*.py")}
    assert named <= there, named - there
    parts = {path.name for name in ("fast", "memory", "quantize") for path in (trainer / name).glob("*.py")}
    folders = {f"{path.parent.name}/" for path in trainer.glob("*/__init__.py")}
    assert (parts | folders) - {"__init__.py"} <= named


# Lint


def scripts() -> list[Path]:
    return files(".js", *TOPS)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_every_script_parses():
    for path in scripts():
        checked = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_no_script_takes_anothers_name():
    """The scripts share one object; the later of two would silently replace the earlier."""
    names = [name for path in files(".js", "app")
             for name in re.findall(r"^ *Studio\.(\w+) = ", path.read_text(encoding="utf-8"), re.MULTILINE)]
    assert len(names) > 20 and {name for name in names if names.count(name) > 1} == {"selected"}  # the run: a value


def test_ruff_finds_nothing():
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", *TOPS, "launch.py"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# The pins


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt"])
def test_every_requirement_is_pinned_exactly_and_explained(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w-]+==[\d.]+(; \S.*)?  # \S.*", line), line


def test_packages_that_break_installations_are_not_required():
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "tests/requirements.txt").read_text()
    named = set(re.findall(r"^([\w-]+)==", text, flags=re.MULTILINE))
    assert not named & {"torchvision", "torchaudio", "torch-fidelity", "open_clip_torch", "trackio"}
    assert {"torch", "diffusers", "peft", "gradio", "bitsandbytes", "pytest"} <= named
