"""What the browser is told of a run: everything once, then only news, cut back where a run was resumed."""

import json
import math

import pytest

from app import feed
from app.columns import MOST_ROWS
from trainer import run
from trainer.events import EventWriter


@pytest.fixture
def ours(tmp_path):
    return run.create(tmp_path, "a", "version = 1\n")


def steps(writer, first, last, loss=lambda step: 1 / step):
    for step in range(first, last + 1):
        writer.write("step", step=step, steps=last, loss=loss(step), lr=1e-4, sec=0.5, eta=1.0, vram=None)


def test_the_first_answer_is_whole_and_the_next_has_only_news(ours):
    writer = EventWriter(ours.events)
    writer.write("start", step=0, steps=3, device="cpu", host="box", torch="2")
    steps(writer, 1, 2)
    first = feed.read(ours, "")
    assert first["reset"] and first["steps"] == {"step": [1, 2], "loss": [1.0, 0.5], "lr": [1e-4, 1e-4]}
    assert first["machine"] == "cpu, torch 2, box" and first["now"] == {"sec": 0.5, "eta": 1.0}
    steps(writer, 3, 3)
    second = feed.read(ours, first["cursor"])
    assert second["steps"]["step"] == [3] and "reset" not in second and "notes" not in second
    third = feed.read(ours, second["cursor"])
    assert third == {"cursor": second["cursor"]}


def test_a_run_without_events_answers_with_nothing(ours):
    answer = feed.read(ours, "")
    assert answer["reset"] and "steps" not in answer
    EventWriter(ours.events).write("note", step=0, text="hello")
    assert feed.read(ours, answer["cursor"])["notes"][0][3] == "hello"


def test_a_half_written_line_waits_for_its_end(ours):
    writer = EventWriter(ours.events)
    steps(writer, 1, 1)
    cursor = feed.read(ours, "")["cursor"]
    line = json.dumps({"t": 1, "kind": "step", "step": 2, "loss": 0.25, "lr": 1}).encode()
    with open(ours.events, "ab") as file:
        file.write(line[:20])
        file.flush()
        assert "steps" not in feed.read(ours, cursor)
        file.write(line[20:] + b"\n")
    assert feed.read(ours, cursor)["steps"]["loss"] == [0.25]


def test_a_resume_cuts_back_what_the_page_has_and_what_comes_with_it(ours):
    writer = EventWriter(ours.events)
    steps(writer, 1, 20)
    cursor = feed.read(ours, "")["cursor"]
    steps(writer, 21, 30)
    writer.write("start", step=10, steps=40)
    steps(writer, 11, 12, loss=lambda step: 0.125)
    answer = feed.read(ours, cursor)
    assert answer["rewind"] == 10
    assert answer["steps"] == {"step": [11, 12], "loss": [0.125, 0.125], "lr": [1e-4, 1e-4]}
    whole = feed.read(ours, "")
    assert whole["steps"]["step"] == list(range(1, 13)) and "rewind" not in whole


@pytest.mark.parametrize("cursor", ["x", "0-0", "ffff-10", "-1", "1-99999999999999999", "a-b", "1-" + "9" * 15, "\0"])
def test_a_cursor_of_another_file_begins_anew(ours, cursor):
    steps(EventWriter(ours.events), 1, 3)
    answer = feed.read(ours, cursor)
    assert answer["reset"] and answer["steps"]["step"] == [1, 2, 3]


def test_a_file_that_was_replaced_begins_anew(ours, tmp_path):
    steps(EventWriter(ours.events), 1, 3)
    cursor = feed.read(ours, "")["cursor"]
    steps(EventWriter(tmp_path / "other"), 1, 9)
    (tmp_path / "other").replace(ours.events)
    answer = feed.read(ours, cursor)
    assert answer["reset"] and len(answer["steps"]["step"]) == 9


def test_a_long_run_is_thinned_out_and_keeps_its_peaks_and_mean(ours):
    def loss(step):
        return 100.0 if step == 7777 else -50.0 if step == 15000 else math.sin(step)

    steps(EventWriter(ours.events), 1, 20_000, loss)
    columns = feed.read(ours, "")["steps"]
    assert len(columns["step"]) <= MOST_ROWS
    assert columns["step"] == sorted(set(columns["step"]))
    assert max(columns["loss"]) == 100.0 and min(columns["loss"]) == -50.0
    assert sum(columns["n"]) == 20_000
    true_mean = sum(loss(step) for step in range(1, 20_001)) / 20_000
    mean = sum(m * n for m, n in zip(columns["mean"], columns["n"])) / 20_000
    assert mean == pytest.approx(true_mean, abs=1e-3)


def test_losses_that_are_no_numbers_do_not_stop_the_thinning(ours):
    steps(EventWriter(ours.events), 1, 5_000, lambda step: math.nan if step % 2 or 1000 < step < 2000 else 1.0)
    columns = feed.read(ours, "")["steps"]
    assert None in columns["loss"] and 1.0 in columns["loss"]
    json.dumps(columns, allow_nan=False)


def test_news_of_a_second_are_small(ours):
    writer = EventWriter(ours.events)
    steps(writer, 1, 3000)
    cursor = feed.read(ours, "")["cursor"]
    steps(writer, 3001, 3001)
    assert len(json.dumps(feed.read(ours, cursor))) < 300


def test_effective_rank_by_group_becomes_columns(ours):
    writer = EventWriter(ours.events)
    writer.write("rank", step=10, erank={"up": 3.0}, rank=8, stable={"up": 2.0}, orth_error=1e-7)
    writer.write("rank", step=20, erank={"up": 3.5, "mid": 2.0}, rank=8)
    assert feed.read(ours, "")["ranks"] == {
        "step": [10, 20], "rank": [8, 8], "orth_error": [1e-7, None],
        "erank": {"mid": [None, 2.0], "up": [3.0, 3.5]}, "stable": {"mid": [None, None], "up": [2.0, None]}}


def test_pictures_outside_of_samples_are_left_out(ours):
    writer = EventWriter(ours.events)
    names = ["samples/a.png", "../../x.png", "/etc/passwd", "preset.toml", "samples/../preset.toml", "samples/b.png"]
    writer.write("sample", step=5, images=names, prompts=list("abcdef"), seed=7)
    [sample] = feed.read(ours, "")["samples"]
    assert sample["cells"] == [["a", "samples/a.png", 7], ["f", "samples/b.png", 12]]


def test_an_export_is_offered_only_when_its_file_is_one_of_ours(ours):
    writer = EventWriter(ours.events)
    ours.exports.mkdir()
    ours.result.write_bytes(b"x" * 10)
    (ours.exports / "a-000005.safetensors").write_bytes(b"x" * 20)
    (ours.path / "other.safetensors").write_bytes(b"x")
    for path in (ours.result.name, "exports/a-000005.safetensors", "other.safetensors", "../a.safetensors",
                 "preset.toml", "exports/gone.safetensors"):
        writer.write("export", step=5, path=path, format="kohya", weights="raw", worst_rel_error=1e-4, unmatched=["k"])
    exports = feed.read(ours, "")["exports"]
    assert [export.get("file") for export in exports] == ["a.safetensors", "exports/a-000005.safetensors"] + [None] * 4
    assert [export["bytes"] for export in exports[:2]] == [10, 20]
    assert exports[0]["unmatched"] == 1 and exports[0]["worst_rel_error"] == 1e-4


def test_a_run_that_was_renamed_offers_its_files_under_the_new_name(ours):
    ours.exports.mkdir()
    ours.result.write_bytes(b"x")
    ours.export_of(5).write_bytes(b"x")
    writer = EventWriter(ours.events)
    for path in ("before.safetensors", "exports/before-000005.safetensors", "../exports/before-000005.safetensors"):
        writer.write("export", step=5, path=path)
    assert [row.get("file") for row in feed.read(ours, "")["exports"]] == [
        "a.safetensors", "exports/a-000005.safetensors", None]


def test_an_export_names_the_programs_that_read_it(ours):
    writer = EventWriter(ours.events)
    ours.result.write_bytes(b"x")
    for readers in (["ComfyUI", "Forge"], "ComfyUI"):
        writer.write("export", step=5, path=ours.result.name, readers=readers, others=[])
    exports = feed.read(ours, "")["exports"]
    assert [(row["readers"], row["others"]) for row in exports] == [(["ComfyUI", "Forge"], []), ([], [])]


def test_what_happened_is_told_in_words(ours):
    writer = EventWriter(ours.events)
    writer.write("start", step=0, steps=10)
    writer.write("checkpoint", step=5, path="x", bytes=3_100_000, sec=0.1)
    writer.write("skipped", file="a.png", reason="broken")
    writer.write("end", step=7, reason="error", error="loss is not finite")
    answer = feed.read(ours, "")
    assert [note[1:] for note in answer["notes"]] == [
        [0, "plain", "started, 10 steps to go"], [5, "plain", "saved a checkpoint (3.1 MB)"],
        [7, "bad", "failed: loss is not finite"]]
    assert answer["skipped"] == [["a.png", "broken"]]


def test_unknown_and_malformed_events_are_passed_over(ours):
    ours.events.write_text('{"kind": 5}\n[1]\nnot json\n{"kind": "step", "step": null}\n'
                           '{"kind": "step"}\n{"kind": "sample", "images": 3}\n'
                           '{"kind": "rank", "erank": [1]}\n{"kind": "new", "x": 1}\n{"kind":"start","step":"x"}\n')
    answer = feed.read(ours, "")
    assert answer["steps"] == {"step": [None], "loss": [None], "lr": [None]}
    assert answer["samples"][0]["cells"] == []


def test_the_finer_measures_come_as_columns_and_only_when_there_is_news(ours):
    writer = EventWriter(ours.events)
    writer.write("start", step=0, steps=9, **{"from": {"run": "old", "step": 400}})
    writer.write("rank", step=5, rank=8, erank={"up": 3.0}, blocks={"up.0": [3.0, 2.0, 0.1]})
    writer.write("timesteps", step=5, loss=[0.5] * 10, count=[2] * 10)
    writer.write("image_loss", step=5, images={"/a.png": [1, 2.0]})
    writer.write("best", step=5, by="kid", value=14.2, low=4.1, high=24.3, why="KID is the lowest.")
    writer.write("prompts", step=5, prompts=["a cat"])
    first = feed.read(ours, "")
    assert first["origin"] == ["old", 400] and first["hard"] == [5] and first["prompts"] == ["a cat"]
    assert first["blocks"] == {"step": [5], "rank": [8], "erank": {"up.0": [3.0]}}
    assert first["bins"] == {"step": [5], "loss": [[0.5] * 10], "count": [[2] * 10]}
    assert first["bests"] == [{"step": 5, "by": "kid", "value": 14.2, "low": 4.1, "high": 24.3,
                               "why": "KID is the lowest."}]
    told = [note[3] for note in first["notes"]]
    assert told == ["began as a branch of old at step 400", "the best checkpoint so far: KID is the lowest.",
                    "draws 1 prompt from now on: the prompts were changed"]
    writer.write("end", step=9, reason="early", text="Validation loss rises.")
    news = feed.read(ours, first["cursor"])
    assert set(news) == {"cursor", "notes"}
    assert news["notes"][0][2:] == ["good", "stopped early: Validation loss rises."]


@pytest.mark.parametrize("source", ["x", {"run": "../x", "step": 1}, {"run": 5}, {"step": 3}, None])
def test_a_branch_of_what_is_no_run_is_told_of_and_not_linked(ours, source):
    EventWriter(ours.events).write("start", step=0, steps=9, **{"from": source})
    assert feed.read(ours, "").get("origin") is None
