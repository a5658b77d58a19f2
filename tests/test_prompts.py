"""Prompts changed while a run trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import preset as presets
from trainer import prompts
from trainer import run as runs
from trainer.errors import UserError
from trainer.events import Event, EventReader
from trainer.loop import run_training
from trainer.run import Run

SHORT = ("train.steps=2", "sample.every=1", "evaluate.every=0", "log.rank_every=0", "output.save_every=1")


def events(run: Run, kind: str) -> list[Event]:
    return [event for event in EventReader(run.events).read() if event["kind"] == kind]


def begin(preset_file: Path, workspace: Path, *overrides: str) -> Run:
    return runs.create(workspace, "run", "# mine\n" + presets.dumps(presets.load(preset_file, [*SHORT, *overrides])))


@pytest.mark.parametrize("wish", ["", "{}", '"a cat"', "[1]", "[", '["a", null]', "\x00"])
def test_a_request_that_is_no_list_of_texts_is_refused(wish: str) -> None:
    with pytest.raises(UserError, match="write a JSON list of texts"):
        prompts.parse(wish)


def test_empty_prompts_are_left_out_and_too_many_or_too_long_ones_refused() -> None:
    assert prompts.parse('["  a cat ", "", " "]') == ["a cat"]
    assert prompts.parse("[]") == []
    for wish in ('["a"' + ', "b"' * prompts.MOST + "]", '["' + "a" * (prompts.LONGEST + 1) + '"]'):
        with pytest.raises(UserError, match="at most 50 prompts of at most 2000 characters"):
            prompts.parse(wish)


def test_changed_prompts_are_drawn_next_and_outlive_a_resume(tiny_project: Path, tmp_path: Path) -> None:
    run = begin(tiny_project, tmp_path)
    run.request("prompts", ["never seen", "a blue square"])
    run_training(run, presets.load(run.preset), tmp_path)
    assert [(event["step"], event["prompts"]) for event in events(run, "prompts")] == [
        (0, ["never seen", "a blue square"])]
    assert {tuple(event["prompts"]) for event in events(run, "sample")} == {("never seen", "a blue square")}
    assert not run.asked("prompts")
    assert run.preset.read_text().startswith("# mine\n")
    assert presets.load(run.preset).sample.prompts == ["never seen", "a blue square"]


def test_prompts_changed_between_two_steps_count_from_the_next_samples(tiny_project: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tiny_project, tmp_path)
    from trainer import housekeeping

    after_step = housekeeping.due_after

    def ask(*arguments: object) -> set[str]:
        due = after_step(*arguments)
        if arguments[0].progress.step == 1:
            run.request("prompts", ["new"])
            due |= after_step(*arguments)
        return due

    monkeypatch.setattr(housekeeping, "due_after", ask)
    run_training(run, presets.load(run.preset), tmp_path)
    assert [(event["step"], event["prompts"]) for event in events(run, "sample")] == [
        (1, ["a red circle"]), (2, ["new"])]
    assert [event["step"] for event in events(run, "prompts")] == [1]


def test_a_bad_request_is_a_note_and_the_prompts_stay(tiny_project: Path, tmp_path: Path) -> None:
    run = begin(tiny_project, tmp_path, "output.cover=true")
    run.request("prompts", [])  # a cover needs a prompt
    run_training(run, presets.load(run.preset), tmp_path)
    assert run.state().word == "done" and not events(run, "prompts")
    assert presets.load(run.preset).sample.prompts == ["a red circle"]
    (note,) = [event["text"] for event in events(run, "note")]
    assert note.startswith("changing the prompts failed, training goes on: ") and "output.cover" in note
