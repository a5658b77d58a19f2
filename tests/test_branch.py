"""A new run from a checkpoint of another one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trainer import branch, checkpoint
from trainer import preset as presets
from trainer import run as runs
from trainer.__main__ import main
from trainer.errors import UserError
from trainer.events import Event, EventReader
from trainer.loop import run_training
from trainer.run import Origin, Run
from trainer.setup import share_batch

QUIET = ("sample.prompts=[]", "log.rank_every=0", "output.keep=9")


def events(run: Run, kind: str) -> list[Event]:
    return [event for event in EventReader(run.events).read() if event["kind"] == kind]


def train(run: Run) -> Run:
    run_training(run, presets.load(run.preset), run.path.parent.parent)
    return run


@pytest.fixture(scope="module")
def origin(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of six steps with checkpoints at 3 and 6."""
    workspace = tmp_path_factory.mktemp("branch")
    preset = presets.load(tiny_project, QUIET)
    return train(runs.create(workspace, "cat", presets.dumps(preset)))


def begin(origin: Run, *overrides: str, step: int | None = 3, name: str | None = None) -> Run:
    return branch.begin(origin.path.parent.parent, origin, step, branch.preset_of(origin, overrides), name)


def content(run: Run) -> dict[str, bytes]:
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in run.path.rglob("*")
            if path.is_file() and path.name != "lock"}


def test_an_unchanged_branch_is_the_run_itself_to_the_bit_and_leaves_it_alone(origin) -> None:
    before = content(origin)
    run = begin(origin)
    assert run.name == "cat-2" and run.origin() == Origin("cat", 3) and run.state().word == "new"
    train(run)
    assert events(run, "start")[0]["from"] == {"run": "cat", "step": 3} and events(run, "start")[0]["step"] == 3
    assert [event["step"] for event in events(run, "step")] == [4, 5, 6]
    assert "from" not in events(origin, "start")[0]
    mine, others = load_file(run.result), load_file(origin.result)
    assert mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)
    assert content(origin) == before


def test_other_settings_count_from_the_checkpoint_on(origin) -> None:
    run = train(begin(origin, "train.lr=1e-5", "train.steps=8", "train.batch_size=1", "data.flip=false",
                      "train.seed=5", name="slow"))
    assert run.last_step() == 8 and events(run, "end")[-1]["reason"] == "done"
    assert max(event["lr"] for event in events(run, "step")) < 1e-5
    progress = json.loads((run.checkpoint(8) / "progress.json").read_text())
    assert (progress["global_batch"], progress["patient_since"], progress["fresh"]) == (1, 3, [])
    assert [event["step"] for event in events(run, "best")] and not run.export_of(3).samefile(origin.export_of(3))


def test_a_branch_begins_on_any_number_of_gpus_as_a_new_run_does(origin) -> None:
    run = begin(origin)
    preset, saved = presets.load(run.preset), checkpoint.last_progress(run)
    assert [share_batch(preset, saved, SimpleNamespace(size=size), None) for size in (1, 3)] == [preset, preset]


@pytest.mark.parametrize(("override", "said"), [
    ("train.ema_decay=0", "the running average ends here"),
    ("train.optimizer=sgd", "train.optimizer = 'sgd' begins anew here")])
def test_what_does_not_fit_begins_anew_and_is_told(origin, override: str, said: str) -> None:
    run = train(begin(origin, override))
    assert any(note["text"].startswith(said) for note in events(run, "note")), events(run, "note")
    assert run.state().word == "done" and all(math.isfinite(event["loss"]) for event in events(run, "step"))


def test_an_average_that_begins_at_the_branch_begins_at_its_weights(tiny_project, tmp_path) -> None:
    preset = presets.load(tiny_project, [*QUIET, "train.ema_decay=0", "train.steps=2", "output.save_every=1"])
    plain = train(runs.create(tmp_path, "plain", presets.dumps(preset)))
    run = train(begin(plain, "train.ema_decay=0.9", step=1))
    assert any(note["text"] == "the running average begins here" for note in events(run, "note"))
    first, raw = load_file(run.export_of(1)), load_file(plain.export_of(1))
    assert all(torch.equal(first[key], raw[key]) for key in raw)


@pytest.mark.parametrize(("overrides", "named"), [
    (["adapter.rank=8"], "adapter.rank"), (["adapter.method=stella"], "adapter.method"),
    (['adapter.targets=["feed_forward"]'], "adapter.targets"), (["adapter.dora=true"], "adapter.dora"),
    (["adapter.rank=2", "adapter.init=pissa"], "adapter.rank, adapter.init"),
    (["adapter.target_pattern=attn1"], "adapter.target_pattern")])
def test_another_adapter_is_refused_by_its_key_with_the_way_out(origin, overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=f"cannot change {named}. .*adapter.start_from"):
        branch.preset_of(origin, overrides)


def test_steps_checkpoints_and_names_that_cannot_be_are_refused(origin, tmp_path) -> None:
    here = sorted(path.name for path in origin.path.parent.iterdir())
    for step, overrides, name, said in (
            (4, [], None, "cat has no checkpoint at step 4; it has: 3, 6"),
            (None, [], None, "train.steps = 6: a branch goes on counting at its checkpoint, which is at step 6"),
            (3, [], "cat", "already a run called 'cat'"), (3, [], "../x", "cannot be a run's name")):
        with pytest.raises(UserError, match=said):
            begin(origin, *overrides, step=step, name=name)
    empty = runs.create(tmp_path, "empty", origin.preset.read_text())
    with pytest.raises(UserError, match="empty has no checkpoint yet to branch from"):
        begin(empty)
    assert sorted(path.name for path in origin.path.parent.iterdir()) == here


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["gone", "half"])
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_is_left(origin, tmp_path, file: str,
                                                                      damage: str) -> None:
    copy = runs.create(tmp_path, "copy", origin.preset.read_text())
    copy.checkpoint(3).mkdir(parents=True)
    for path in origin.checkpoint(3).iterdir():
        data = path.read_bytes()
        if path.name != file:
            (copy.checkpoint(3) / path.name).write_bytes(data)
        elif damage == "half":
            (copy.checkpoint(3) / path.name).write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError):
        begin(copy)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["copy"]


def test_a_branch_that_could_not_start_gives_its_name_free(origin) -> None:
    run = begin(origin, "evaluate.folder=nowhere", name="wrong")
    with pytest.raises(UserError):
        train(run)
    assert run.never_began() and runs.list_runs(origin.path.parent.parent)
    assert begin(origin, name="wrong").checkpoint_steps() == [3]
    assert not begin(origin, name="right").never_began()


def test_a_branch_that_could_not_start_keeps_its_name_with_the_only_copy_of_its_checkpoint(origin) -> None:
    run = begin(origin, "evaluate.folder=nowhere", name="worse")
    with pytest.raises(UserError):
        train(run)
    aside = origin.checkpoint(3).rename(origin.path / "aside")
    assert not run.never_began() and runs.free_name(origin.path.parent.parent, "worse") == "worse-2"
    aside.rename(origin.checkpoint(3))
    assert run.never_began()


def test_the_command_line_branches_and_says_what_is_wrong(origin, capsys) -> None:
    workspace = ["--workspace", str(origin.path.parent.parent)]
    assert main(["--branch", "cat@3", "--name", "line", "--set", "train.steps=4", *workspace]) == 0
    assert Run(origin.path.parent / "line").last_step() == 4
    assert main(["show", "line", *workspace]) == 0 and "branch of    cat at step 3" in capsys.readouterr().out
    for words, said in ((["--branch", "cat@x"], "write it as RUN@STEP"), (["--branch", "cow"], "no run called 'cow'"),
                        (["--branch", "cat@3", "--set", "adapter.rank=2"], "cannot change adapter.rank")):
        assert main([*words, *workspace]) == 1 and said in capsys.readouterr().err
    assert main(["--branch", "cat@3", "--check", *workspace]) == 0


def test_epochs_that_the_branch_has_behind_it_are_refused(tiny_project, tmp_path) -> None:
    preset = presets.load(tiny_project, [*QUIET, "train.epochs=2", "output.save_every=1"])
    first = train(runs.create(tmp_path, "first", presets.dumps(preset)))
    with pytest.raises(UserError, match="train.epochs = 1: that is .* steps, and the branch begins at step"):
        train(begin(first, "train.epochs=1", step=None))
    assert train(begin(first, "train.epochs=3", step=None, name="more")).last_step() == 3 * first.last_step() // 2
