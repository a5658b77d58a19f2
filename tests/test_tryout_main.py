"""The command line that draws with a finished LoRA: which base it takes, what it writes, what it refuses."""

import pytest

from tests.family_runs import MAKERS
from tests.test_tryout_bench import lora
from trainer import run as runs
from trainer.export.convert import convert
from trainer.export.texts import Labels
from trainer.tryout import origin, task
from trainer.tryout.__main__ import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = MAKERS["sd15"](folder / "base")
    return base, lora(folder / "a.safetensors", base, "sd15")


def test_pictures_of_several_strengths_and_without(made, tmp_path, capsys):
    base, file = made
    code = main([str(file), "--base", str(base), "--prompt", "a red circle", "--steps", "2", "--strength", "0.5", "1",
                 "--seed", "7", "--without", "--device", "cpu", "--out", str(tmp_path)])
    names = ["a-7-0.5.png", "a-7-1.png", "a-7-base.png"]
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == names
    assert [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == names


def test_a_runs_file_finds_the_runs_base(made, tmp_path):
    base, file = made
    text = f'[model]\nfamily = "sd15"\nbase = "{base}"\nclip_skip = 2\n[data]\nfolder = "d"\n[train]\nsteps = 3\n'
    run = runs.create(tmp_path, "cats", text)
    run.exports.mkdir()
    for path in (run.result, run.exports / "cats-000500.safetensors"):
        convert(file, "auto", path, labels=Labels())
        found = task.parse(task.Settings, origin.find(path, ""))
        assert (found.base, found.clip_skip, found.quantize) == (str(base), 2, "none")


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "give a LoRA"), (["{file}", "--prompt", "x"], "does not tell where its base model is"),
    (["{file}", "--base", "nowhere", "--prompt", "x"], "there is no folder or file nowhere"),
    (["{file}", "--base", "{base}", "--strength", "99"], "strength"), (["gone.safetensors"], "gone.safetensors"),
    (["{file}", "--base", "{base}", "--device", "tpu"], "device"), (["--task", "{base}"], "no folder of a try-out"),
    (["{file}", "--base", "{base}", "--what"], "--what")])
def test_what_is_wrong_is_one_plain_sentence(made, capsys, arguments, words):
    base, file = made
    assert main([argument.format(base=base, file=file) for argument in arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert words in said and len(said.splitlines()) == 1


def test_the_side_that_a_file_was_trained_at_is_read():
    assert task.trained_side({"modelspec.resolution": "768x512"}) == 768
    assert task.trained_side({"ss_resolution": "(512, 512)"}) == 512
    assert task.trained_side({"ss_resolution": "(a, b)"}) == task.trained_side({}) == 0
    for preset in ("[model", "model = 1", "[model]\nbase = 5", "a = " + "[" * 5000):
        assert origin.said_base({"stiefel_studio_preset": preset, "ss_sd_model_name": "x"}) == "x"
