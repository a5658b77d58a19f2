"""Several GPUs as one command: which ones are meant, and the first process's word counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer import several
from trainer.__main__ import main
from trainer.errors import UserError

THREE = {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,4"}


def test_gpus_are_numbered_as_this_shell_sees_them_and_taken_in_order() -> None:
    assert several.choose("0,1", THREE) == ["GPU-a", "GPU-b"]
    assert several.choose("2, 0", THREE) == ["GPU-a", "4"]  # always in one order, so that runs cannot block each other


@pytest.mark.parametrize(("text", "said"), [
    ("0,7", "there is no GPU 7; this machine has 3, numbered from 0"), ("0,0", "each once"), ("all", "such as 0,1"),
    ("0,", "such as 0,1")])
def test_gpus_that_are_not_there_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        several.choose(text, THREE)


def test_a_machine_without_gpus_says_so() -> None:
    with pytest.raises(UserError, match="this machine has none"):
        several.choose("0", {"CUDA_VISIBLE_DEVICES": ""})


def test_a_preset_that_names_several_gpus_starts_a_process_for_each(tiny_project, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(several, "TRAINER", program(
        tmp_path, f"open({str(tmp_path / 'told')!r} + str(rank), 'w').write(' '.join("
                  "[os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:]]))"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,4")
    words = ["--preset", str(tiny_project), "--workspace", str(tmp_path), "--set=memory.device=cuda:2,0"]
    assert main(words) == 0
    assert [(tmp_path / f"told{rank}").read_text() for rank in (0, 1)] == [" ".join(["GPU-a,4", *words])] * 2
    assert not (tmp_path / "runs").exists()  # the processes begin it, together


def test_gpus_that_a_preset_names_in_vain_are_told_by_its_setting(tiny_project, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert main(["--preset", str(tiny_project), "--workspace", str(tmp_path), "--set=memory.device=cuda:0,1"]) == 1
    assert capsys.readouterr().err == ("memory.device = 'cuda:0,1': there is no GPU 1; this machine has 1, numbered "
                                       "from 0; --gpus chooses others, such as --gpus 0\n")


def test_a_shortened_word_is_refused_since_it_would_be_passed_on(tiny_project, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(several, "launch", None)  # its processes would launch others without end
    assert main(["--preset", str(tiny_project), "--workspace", str(tmp_path), "--gpu", "0"]) == 1
    assert "unrecognized arguments: --gpu 0" in capsys.readouterr().err


def test_the_choice_is_not_passed_on() -> None:
    assert several.without_choice(["--preset", "a", "--gpus", "0,1", "--name", "b"]) == [
        "--preset", "a", "--name", "b"]
    assert several.without_choice(["--gpus=0,1", "--check"]) == ["--check"]


def program(tmp_path: Path, text: str) -> tuple[str, str]:
    (tmp_path / "program.py").write_text(f"import os, signal, sys\nrank = int(os.environ['RANK'])\n{text}\n")
    return sys.executable, str(tmp_path / "program.py")


@pytest.mark.parametrize(("text", "code"), [
    ("sys.exit(0)", 0), ("sys.exit(1 - rank)", 1), ("sys.exit(rank)", 0),
    ("assert os.environ['WORLD_SIZE'] == '2' and os.environ['CUDA_VISIBLE_DEVICES'] == 'a,b' and sys.argv[1:] == ['x']",
     0)])
def test_the_first_process_decides_how_it_ended(tmp_path, monkeypatch, text: str, code: int) -> None:
    monkeypatch.setattr(several, "TRAINER", program(tmp_path, text))
    assert several.launch(["x"], ["a", "b"], {}) == code


def test_a_killed_first_process_is_told(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(several, "TRAINER", program(tmp_path, "rank or os.kill(os.getpid(), signal.SIGKILL)"))
    assert several.launch([], ["a", "b"], {}) == 1
    assert "was killed (signal 9)" in capsys.readouterr().err


def test_one_that_hangs_after_the_other_ended_is_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(several, "GRACE", 0.3)
    text = "import time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(0 if rank == 0 else 600)"
    monkeypatch.setattr(several, "TRAINER", program(tmp_path, text))
    assert several.launch([], ["a", "b"], {}) == 0
