"""A base that is on the hub comes before training, told as it comes, and what came stays when the run is stopped."""

from __future__ import annotations

import pytest

from tests.small_hub import REPO, serve
from trainer import check, download
from trainer import preset as presets
from trainer import run as runs
from trainer.control import Stopped
from trainer.events import EventReader
from trainer.families import hub
from trainer.families.hub import Progress
from trainer.record import Recorder


@pytest.fixture
def small_hub(tmp_path, monkeypatch):
    with serve(tmp_path / "repository", tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture
def preset(tiny_project):
    return presets.load(tiny_project, [f"model.base={REPO}"])


@pytest.fixture
def run(tmp_path, preset):
    return runs.create(tmp_path, "cat", presets.dumps(preset))


def phases(run) -> list[dict]:
    return [event for event in EventReader(run.events).read() if event["kind"] == "phase"]


def test_progress_is_said_in_words():
    assert download.describe(Progress(3_200_000_000, 8_100_000_000, 2, 7, 45.2e6)) == (
        "3.2 of 8.1 GB, file 2 of 7, 45.2 MB/s, 2 min left")
    assert download.describe(Progress(0, 8_100_000_000, 1, 7, 0.0)) == "0.0 of 8.1 GB, file 1 of 7"
    assert download.describe(Progress(10**8, 5 * 10**8, 1, 1, 0.0)) == "100.0 of 500.0 MB, file 1 of 1"
    assert download.describe(Progress(10**9, 10**9, 7, 7, 1e6)) == "1.0 of 1.0 GB, file 7 of 7"


def test_a_run_downloads_its_base_and_says_so(small_hub, tiny_project, preset, tmp_path, trainer):
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, f"--set=model.base={REPO}", "--name=cat",
                      "--set=train.steps=1", "--set=sample.prompts=[]", "--set=evaluate.folder=")
    assert outcome.code == 0, outcome.err
    run = runs.Run(tmp_path / "runs" / "cat")
    told = [phase for phase in phases(run) if phase["name"] == "downloading the base model"]
    assert told[-1]["done"] == told[-1]["of"] > 1e6 and told[-1]["detail"].startswith("12.7 of 12.7 MB, file ")
    assert "downloading someone/tiny from the hub: 12.7 MB" in run.log.read_text("utf-8")
    small_hub.asked.clear()
    assert download.missing(preset) == [] and not small_hub.asked  # the next run needs no network


def test_the_app_says_how_far_a_download_is(run):
    with run.hold():
        recorder = Recorder(run, tensorboard=False)
        recorder.event("start", step=0, steps=9)
        recorder.phase("downloading the base model", 3_200_000_000, 8_100_000_000, "3.2 of 8.1 GB, file 2 of 7")
        state = run.state()
        recorder.close()
    assert (state.word, state.text) == ("starting", "downloading the base model: 3.2 of 8.1 GB, file 2 of 7")


def test_a_stop_ends_a_download_and_the_next_try_takes_what_came(small_hub, run, preset, monkeypatch):
    monkeypatch.setattr(hub, "_LOOK", 0.02)
    small_hub.pause = 0.2
    recorder = Recorder(run, tensorboard=False)

    def guard() -> None:
        if sum("/resolve/" in path for path in small_hub.asked) > 14:  # half of the files: a HEAD and a GET each
            raise Stopped

    everything, = download.missing(preset)
    with pytest.raises(Stopped):
        download.fetch_base(preset, recorder, guard)
    rest, = download.missing(preset)
    assert 0 < len(rest.files) < len(everything.files) and rest.files == everything.files[-len(rest.files):]
    small_hub.pause = 0.0
    download.fetch_base(preset, recorder, lambda: None)
    recorder.close()
    assert download.missing(preset) == []


def test_parts_given_apart_are_not_downloaded(small_hub, preset):
    model = preset.model.model_copy(update={"vae": str(small_hub.folder / "vae")})
    plan, = download.missing(preset.model_copy(update={"model": model}))
    assert not any(name.startswith("vae/") for name, _ in plan.files)
    assert any(name.startswith("unet/") for name, _ in plan.files)


def test_a_check_tells_the_size_and_downloads_nothing(small_hub, preset, tmp_path):
    report = check.inspect(preset, tmp_path)
    assert report.errors == [] and report.facts["download"].startswith("someone/tiny, 12.7 MB, comes when training")
    assert any("not on this machine yet" in warning for warning in report.warnings)
    assert not any(path.endswith(".safetensors") for path in small_hub.asked)


def test_a_model_of_another_family_is_told_before_its_weights_come(small_hub, tiny_project, tmp_path, trainer):
    index = small_hub.folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, f"--set=model.base={REPO}")
    assert outcome.code == 1 and not runs.is_taken(tmp_path, "tiny")
    assert "someone/tiny is an SDXL model, and model.family = 'sd15' needs an SD 1.5 model: set" in outcome.err
    assert not any(path.endswith(".safetensors") for path in small_hub.asked)
