"""LoRA files for the app: which it may read, what they are, the tools as processes, and their answers for the page."""

import json
import os
import shutil
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from app.bases import Bases
from app.exporting import HAVE, PROGRAMS, Exporting, targets
from app.paths import Places
from app.tabs import export
from tests import lora_bases
from trainer import run as runs
from trainer.detached import Launch
from trainer.errors import UserError
from trainer.export.consumers import CONSUMERS, READERS
from trainer.export.lora_file import open_lora

PRESET = '[model]\nfamily = "sd15"\nbase = "b"\n[data]\nfolder = "d"\n[train]\nsteps = 3\n'


@pytest.fixture
def exporting(tmp_path):
    """A workspace with a run of two files and a sample, and a folder with a LoRA and what is none."""
    root = tmp_path / "models"
    places = Places(tmp_path / "w", (root,))
    run = runs.create(places.workspace, "cats", PRESET)
    lora_bases.lora(run.result, "sd15", ("attention",))
    run.exports.mkdir(exist_ok=True)
    shutil.copy(run.result, run.exports / "cats-000500.safetensors")
    run.samples.mkdir(exist_ok=True)
    for name in ("000000_00", "000500_00", "000500_01"):
        Image.new("RGB", (8, 8)).save(run.samples / f"{name}.png")
    (root / "inner").mkdir(parents=True)
    lora_bases.lora(root / "inner" / "klein.safetensors", "klein", ("attention",))
    (root / ".hidden.safetensors").write_bytes(b"x")
    os.symlink(root / "inner" / "klein.safetensors", root / "link.safetensors")
    return Exporting(places)


def follow(exporting, task):
    end = time.monotonic() + 90
    while (answer := exporting.progress(task))["word"] == "working":
        assert time.monotonic() < end
        time.sleep(0.05)
    return answer


def test_files_of_runs_and_roots_are_found(exporting):
    found = exporting.sources()
    assert [(row["id"], row["label"]) for row in found["runs"][0]["files"]] == [
        ("run:cats/cats.safetensors", "the result"), ("run:cats/exports/cats-000500.safetensors", "step 500")]
    assert [row["id"] for row in found["others"]] == ["0:inner/klein.safetensors"] and found["made"] == []


def test_a_file_is_told_by_its_header_alone(exporting):
    about = exporting.look("run:cats/cats.safetensors")
    assert (about["family"], about["format"], about["ranks"], about["title"]) == ("sd15", "U1", [3], "cats")
    assert [target["id"] for target in about["targets"]] == ["comfyui", "a1111", "forge", "diffusers"]
    assert [cover["name"] for cover in about["covers"]] == ["000500_00.png", "000500_01.png"]
    other = exporting.look("0:inner/klein.safetensors")
    assert [(target["id"], target["format"]) for target in other["targets"]] == [
        ("comfyui", "F1"), ("diffusers", "F1"), ("comfyui-old", "F6")] and other["covers"] == []


def test_programs_are_those_that_verify_knows():
    assert PROGRAMS == CONSUMERS and {family: tuple(names) for family, names in READERS.items()} == HAVE
    assert all(target["format"] for family in HAVE for target in targets(family))


@pytest.mark.parametrize("id", ["", "cats.safetensors", "run:../w/runs/cats/cats.safetensors", "run:cats/preset.toml",
                                "0:../w/runs/cats/cats.safetensors", "0:/etc/passwd", "1:a.safetensors", "made:x",
                                "run:cats/none.safetensors", "made:" + "x" * 1200])
def test_only_lora_files_below_the_folders_are_read(exporting, id):
    with pytest.raises(UserError):
        exporting.look(id)


def test_a_file_that_is_no_lora_is_told(exporting):
    save_file({"conv_in.weight": torch.ones(1)}, exporting.places.roots[0] / "base.safetensors")
    with pytest.raises(UserError, match="cannot be read here"):
        exporting.look("0:base.safetensors")


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "a\nb", "x" * 101, "über"])
def test_names_of_new_files_stay_in_their_folder(exporting, name):
    with pytest.raises(UserError, match="a file's name begins"):
        exporting.out(name)


def test_names_that_are_taken_are_refused_and_free_ones_found(exporting):
    exporting.places.exports.mkdir(parents=True)
    for name in ("cats", "cats-2"):
        (exporting.places.exports / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="there is already a file called cats"):
        exporting.out("cats.safetensors")
    assert exporting.free_name("cats") == "cats-3" and exporting.free_name("../ü:") == "lora"


def functions(exporting):
    return {function.__name__: function for function in export.functions(exporting, Bases(exporting.places))}


def test_a_file_is_written_for_a_program_and_checked(exporting):
    server = functions(exporting)
    asked = {"id": "run:cats/cats.safetensors", "format": "U1", "dtype": "fp16", "name": "out", "title": "--odd",
             "author": "Ada", "triggers": "a, b", "cover": "000500_00.png", "no_paths": True}
    answer = follow(exporting, server["start_export"](asked)["task"])["result"]
    assert (answer["file"], answer["rank"], answer["dtype"], answer["format"]) == ("out.safetensors", 3, "fp16", "U1")
    assert [(tick["program"], tick["good"]) for tick in answer["report"]["ticks"]] == [
        (name, False) for name in ("ComfyUI", "A1111", "Forge", "diffusers")]  # it is for a tiny model
    assert "layers do not fit SD 1.5" in answer["report"]["faults"][0]
    said = open_lora(exporting.places.exports / "out.safetensors").metadata
    assert said["modelspec.title"] == "--odd" and said["trained_words"] == '["a","b"]' and "modelspec.thumbnail" in said
    assert str(exporting.places.exports) in exporting.places.handed_out
    assert "already a file called out" in server["start_export"](asked)["error"]


def test_resize_merge_and_compare_answer_for_the_page(exporting):
    server, ids = functions(exporting), ["run:cats/cats.safetensors", "run:cats/exports/cats-000500.safetensors"]
    tasks = [server["start_resize"]({"id": ids[0], "how": "energy", "share": 0.5, "name": "small"}),
             server["start_merge"]({"ids": ids, "weights": [1, -0.5], "name": "merged", "rank": 2}),
             server["start_comparison"]({"ids": ids, "weights": [1.0, 0.5]})]
    small, merged, compared = (follow(exporting, task["task"])["result"] for task in tasks)
    assert 0.5 <= small["kept"] < 1 and len(small["cuts"]) == 12 and small["cuts"][0][1] == 3
    assert merged["rank"] == 2 and (exporting.places.exports / "merged.safetensors").is_file()
    assert "want much the same" in compared["comparison"]["words"][2] and len(compared["comparison"]["layers"]) == 12


@pytest.mark.parametrize("no_paths", [True, False])
def test_folders_of_this_computer_stay_only_where_asked(exporting, monkeypatch, no_paths):
    asked, started, server = {"name": "x", "no_paths": no_paths}, [], functions(exporting)
    monkeypatch.setattr(exporting, "start", lambda arguments, out: started.append(arguments) or "1")
    file = {"id": "run:cats/cats.safetensors"}
    server["start_export"]({**asked, **file, "format": "U1"})
    server["start_resize"]({**asked, **file, "how": "rank", "rank": 2})
    server["start_merge"]({**asked, "ids": [file["id"]] * 2, "weights": [1.0, 1.0]})
    assert [("--keep-paths" in arguments) for arguments in started] == [not no_paths] * 3


def test_what_a_tool_refuses_is_told(exporting):
    server = functions(exporting)
    task = server["start_merge"]({"ids": ["run:cats/cats.safetensors", "0:inner/klein.safetensors"], "weights": [1, 1],
                                  "name": "both"})
    answer = follow(exporting, task["task"])
    assert answer["word"] == "failed" and "only LoRAs of one family can go together" in answer["text"]


@pytest.mark.parametrize(("name", "asked"), [
    ("start_resize", {"how": "rank", "name": "x"}), ("start_resize", {"how": "energy", "share": 2.0, "name": "x"}),
    ("start_export", {"format": "U9", "name": "x"}), ("start_export", {"format": "U1", "name": "x", "cover": "../a"}),
    ("start_merge", {"ids": ["run:cats/cats.safetensors"], "weights": [1.0], "name": "x"}),
    ("start_comparison", {"ids": ["run:cats/cats.safetensors"] * 2, "weights": [1.0]}),
    ("read_task", {"task": "77"}), ("read_task", {"task": "../1"})])
def test_hostile_requests_are_refused(exporting, name, asked):
    full = asked if name.startswith(("read", "start_m", "start_c")) else {"id": "run:cats/cats.safetensors", **asked}
    assert "error" in functions(exporting)[name](full)
    assert not list((exporting.places.workspace / "logs").glob("*")) if exporting.places.logs.exists() else True


@pytest.fixture
def models(exporting):
    """Two base models below the root, and the run's LoRA for them; their ids by name."""
    root = exporting.places.roots[0]
    base = lora_bases.folder(root / "base", "sd15")
    lora_bases.file(root / "single.safetensors", base, "sd15")
    whole = lora_bases.fused("sd15", {exporting.path("run:cats/cats.safetensors"): 1})
    lora_bases.folder(root / "tuned", "sd15", whole)
    return {row["label"].partition(" ")[0]: row["id"] for row in Bases(exporting.places).listing()["bases"]}


def test_base_models_are_found_and_only_those_are_read(exporting, models):
    assert {"base", "single", "tuned"} <= set(models) and "klein" not in models
    bases = Bases(exporting.places)
    with pytest.raises(UserError, match="open the list again"):
        bases.path("found:0000")
    listed = {row["label"].partition(" ")[0]: row for row in bases.listing()["bases"]}
    assert listed["single"]["family"] == "sd15" and listed["single"]["bytes"] > 1000 and listed["base"]["here"]
    assert bases.path(models["base"]) == exporting.places.roots[0] / "base"
    for id in ("", "run:none", "run:../w", "0:base", "found:/etc", "made:x", "demo:"):
        with pytest.raises(UserError):
            bases.path(id)


def test_loras_are_put_into_a_base_and_taken_out_again(exporting, models):
    server = functions(exporting)
    server["list_bases"]({})
    asked = {"ids": ["run:cats/cats.safetensors"], "weights": [1.0], "name": "baked"}
    tasks = {kind: server["start_bake"]({**asked, "base": models[kind], "name": kind}) for kind in ("base", "single")}
    done = {kind: follow(exporting, task["task"])["result"]["model"] for kind, task in tasks.items()}
    assert [done[kind]["folder"] for kind in ("base", "single")] == [True, False] and done["base"]["changed"] > 0
    assert done["single"]["file"] == "single.safetensors"
    assert str(exporting.places.models) in exporting.places.handed_out
    assert "already a base model called base" in server["start_bake"]({**asked, "base": models["single"],
                                                                       "name": "base"})["error"]
    task = server["start_extract"]({"base": models["base"], "tuned": models["tuned"], "rank": 3, "name": "back"})
    found = follow(exporting, task["task"])["result"]
    assert found["file"] == "back.safetensors" and found["kept"] > 0.999 and found["rank"] == 3
    assert "choose two different" in server["start_extract"]({
        "base": models["base"], "tuned": models["base"], "rank": 3, "name": "none"})["error"]


def test_a_file_is_checked_against_the_base_that_is_chosen(exporting, models):
    server = functions(exporting)
    server["list_bases"]({})
    asked = {"id": "run:cats/cats.safetensors"}
    tasks = [server["start_check"](asked | base) for base in ({}, {"base": models["base"]})]
    usual, own = (follow(exporting, task["task"])["result"]["report"]["faults"] for task in tasks)
    assert "do not fit SD 1.5" in usual[0] and own == []


def test_a_tool_is_cancelled_and_leaves_nothing(exporting):
    program = ("import pathlib, sys, time; out = pathlib.Path(sys.argv[-2]);"
               "out.with_name(f'.{out.name}.abcdefgh').write_text('half');"
               "out.with_name(f'.{out.name}.folder12').mkdir();"
               "print('{\"done\": 1, \"of\": 9}', flush=True); time.sleep(60)")
    exporting = Exporting(exporting.places, (sys.executable, "-c", program))
    out = exporting.out("half")
    task = exporting.start([], out)
    end = time.monotonic() + 30
    while exporting.progress(task) != {"word": "working", "done": 1, "of": 9}:
        assert time.monotonic() < end
        time.sleep(0.05)
    exporting.cancel(task)
    assert exporting.progress(task) == {"word": "failed", "text": "Cancelled. Nothing was written."}
    assert list(exporting.places.exports.iterdir()) == []
    exporting.cancel(task)  # once more does no harm


def test_a_tool_that_ends_while_one_looks_has_not_failed(exporting, monkeypatch):
    exporting = Exporting(exporting.places, (sys.executable, "-c", ""))
    task = exporting.start([])
    exporting._task(task).launch.process.wait()

    def ends(launch: Launch) -> bool:
        launch.log.write_text(json.dumps({"words": ["alike"], "layers": [], "names": ["a", "b"]}) + "\n")
        return False

    monkeypatch.setattr(Launch, "is_running", property(ends))
    comparison = {"words": ["alike"], "layers": [], "names": ["a", "b"]}
    assert exporting.progress(task) == {"word": "done", "result": {"comparison": comparison}}


def test_a_page_that_outlives_the_app_meets_no_other_task(exporting, monkeypatch):
    quick = (sys.executable, "-c", "")
    old = Exporting(exporting.places, quick).start([])
    later = time.time() + 1
    monkeypatch.setattr("app.exporting.time.time", lambda: later)
    restarted = Exporting(exporting.places, quick)
    assert restarted.start([]) != old
    with pytest.raises(UserError, match="the app was started again meanwhile"):
        restarted.progress(old)


def test_a_cancel_takes_its_own_draft_alone(exporting):
    program = ("import pathlib, sys, time; out = pathlib.Path(sys.argv[-2]);"
               "out.with_name(f'.{out.name[:60]}.77.partial').write_text('half');"
               "print('{\"done\": 1, \"of\": 9}', flush=True); time.sleep(60)")
    exporting = Exporting(exporting.places, (sys.executable, "-c", program))
    out = exporting.out("long" * 20)
    task = exporting.start([], out)
    end = time.monotonic() + 30
    while exporting.progress(task)["done"] != 1:
        assert time.monotonic() < end
        time.sleep(0.05)
    other = out.with_name(f".{out.name[:60]}.more.safetensors.abcdefgh")
    other.write_text("of another tool")
    exporting.cancel(task)
    assert list(out.parent.iterdir()) == [other]


def test_two_tabs_cannot_write_one_name(exporting):
    exporting = Exporting(exporting.places, (sys.executable, "-c", "import time; time.sleep(60)"))
    file, model = exporting.out("same"), exporting.model_out("same", folder=True)
    tasks = [exporting.start([], file), exporting.start([], model)]
    for again in (lambda: exporting.out("same"), lambda: exporting.model_out("same", folder=False)):
        with pytest.raises(UserError, match="there is already"):
            again()
    with pytest.raises(UserError, match="is being written already"):
        exporting.start([], file)
    for task in tasks:
        exporting.cancel(task)
    assert exporting.out("same") == file and exporting.model_out("same", folder=True) == model


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_strange_entry_of_a_folder_does_not_hide_the_others(exporting):
    for folder in (exporting.places.exports, exporting.places.roots[0] / "inner"):
        folder.mkdir(parents=True, exist_ok=True)
        os.symlink("/nowhere", folder / "gone.safetensors")
        (folder / "folder.safetensors").mkdir()
        (folder / os.fsdecode(b"\xff.safetensors")).write_bytes(b"x")
    shutil.copy(exporting.path("run:cats/cats.safetensors"), exporting.places.exports / "own.safetensors")
    found = exporting.sources()
    assert [row["id"] for row in found["made"]] == ["made:own.safetensors"]
    assert [row["id"] for row in found["others"]] == ["0:inner/klein.safetensors"]


def test_a_full_disk_leaves_no_half_of_an_upload(exporting, tmp_path, monkeypatch):
    upload = tmp_path / "upload.safetensors"
    shutil.copy(exporting.path("run:cats/cats.safetensors"), upload)

    def full(source, target):
        target.write(source.read(100))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        exporting.add("a.safetensors", upload)
    assert list(exporting.places.exports.iterdir()) == [] and upload.exists()


def test_an_uploaded_lora_is_taken_in_and_nothing_else(exporting, tmp_path):
    upload = tmp_path / "upload.safetensors"
    shutil.copy(exporting.path("run:cats/cats.safetensors"), upload)
    assert exporting.add("My LoRA (v2).safetensors", upload) == "made:My LoRA -v2-.safetensors"
    assert exporting.look("made:My LoRA -v2-.safetensors")["family"] == "sd15" and not upload.exists()
    save_file({"conv_in.weight": torch.ones(1)}, upload)
    with pytest.raises(UserError, match=r"^base\.safetensors cannot be read here"):
        exporting.add("base.safetensors", upload)
    with pytest.raises(UserError, match="is no .safetensors file"):
        exporting.add("a.ckpt", upload)
