"""The command line: what a person at a shell, or a script, sees of a run."""

from __future__ import annotations

import os
import re
import struct
import sys
import threading

import pytest
import torch

from trainer import preset as presets
from trainer.events import EventReader
from trainer.run import Run

SHORT = ["--set=train.steps=2", "--set=sample.prompts=[]", "--set=evaluate.every=0", "--set=log.tensorboard=false"]


def kinds(run: Run) -> list[str]:
    return [event["kind"] for event in EventReader(run.events).read()]


def test_a_run_is_called_after_its_preset_and_the_next_one_gets_a_number(tiny_project, tmp_path, trainer) -> None:
    for name in ("tiny", "tiny-2"):
        assert trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT).code == 0
        assert (tmp_path / "runs" / name / f"{name}.safetensors").is_file()


def test_a_preset_with_only_what_it_must_have_trains(tiny_project, tmp_path, trainer) -> None:
    project = tiny_project.parent.as_posix()
    (tmp_path / "least.toml").write_text(
        f'[model]\nfamily = "sd15"\nbase = "{project}/base"\n[data]\nfolder = "{project}/train"\nresolution = 64\n'
        "[train]\nsteps = 2\n", "utf-8")
    outcome = trainer("--preset", tmp_path / "least.toml", "--workspace", tmp_path)
    run = Run(tmp_path / "runs" / "least")
    assert outcome.code == 0 and run.state().word == "done" and run.result.is_file()
    assert "failed" not in run.log.read_text("utf-8")


def test_a_preset_of_the_workspace_is_found_by_its_name_and_set_changes_it(tiny_project, tmp_path, trainer) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.toml").write_bytes(tiny_project.read_bytes())
    outcome = trainer("--preset", "mine", "--workspace", tmp_path, "--name", "a cat", *SHORT, "--set", "adapter.rank=2",
                      "--set", "adapter.method=stella")
    assert outcome.code == 0
    stored = presets.load(Run(tmp_path / "runs" / "a cat").preset)
    assert (stored.adapter.rank, stored.adapter.method, stored.train.optimizer) == (2, "stella", "adamw")


def test_what_is_printed_goes_to_the_log_and_a_pipe_gets_one_line(tiny_project, tmp_path, trainer) -> None:
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT)
    assert outcome == (0, "", f"done at step 2: {tmp_path / 'runs' / 'tiny'}\n")
    log = Run(tmp_path / "runs" / "tiny").log.read_text("utf-8")
    line = r"step 2/2  loss \d\.\d{4}  \d+\.\d\d s/it  ETA 0 s  \d\.\d GiB"
    assert re.search(rf"caching latents\n(.*\n)*{line}\n(.*\n)*done at step 2", log)


def test_a_finished_run_goes_on_with_more_steps(tiny_project, tmp_path, trainer) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    assert trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT).code == 0
    assert trainer("--resume", run.path, "--set", "train.steps=3", "--set", "log.every=1").code == 0
    starts = [event["step"] for event in EventReader(run.events).read() if event["kind"] == "start"]
    assert starts == [0, 2] and run.last_step() == 3 and presets.load(run.preset).train.steps == 3


def test_a_finished_run_that_is_resumed_as_it_is_ends_at_once(tiny_project, tmp_path, trainer) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    command = [*SHORT[:1], *SHORT[2:], "--set=evaluate.distance=efflite0"]
    assert trainer("--preset", tiny_project, "--workspace", tmp_path, *command).code == 0
    before = kinds(run)
    assert {"sample", "distance", "end"} <= set(before)
    assert trainer("--resume", run.path).code == 0
    assert not {"step", "sample", "distance"} & set(kinds(run)[len(before):])
    assert run.state().word == "done"


def test_a_bug_is_code_2_with_its_traceback_in_the_log(tiny_project, tmp_path, trainer, monkeypatch) -> None:
    monkeypatch.setattr("trainer.update.Update.__call__", lambda *_: 1 / 0)
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT)
    run = Run(tmp_path / "runs" / "tiny")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert outcome.err == ("ZeroDivisionError: division by zero. This is a fault of the program; "
                           f"the whole story is in {run.log}\n")
    assert "Traceback" in run.log_tail() and "ZeroDivisionError: division by zero" in run.log_tail()
    assert run.state().word == "failed"


@pytest.mark.parametrize("error, message", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory."), "the GPU ran out of memory: make train.batch_size"),
    (MemoryError(), "the memory of this machine ran out: make train.batch_size"),
    (OSError(28, "No space left", "/disk/x"), "/disk/x cannot be written: No space left. Make room"),
    (PermissionError(13, "Permission denied", "/disk/x"), "/disk/x cannot be used: Permission denied. Give this user"),
], ids=["memory of the GPU", "memory", "disk", "rights"])
def test_what_ran_out_is_a_message_and_not_a_bug(tiny_project, tmp_path, trainer, monkeypatch, error, message) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("trainer.update.Update.__call__", fail)
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT)
    assert outcome.code == 1 and outcome.err.startswith(message) and outcome.err.count("\n") == 1
    assert message in Run(tmp_path / "runs" / "tiny").state().text


def test_a_users_fault_late_in_a_run_keeps_the_steps_made(tiny_project, tmp_path, trainer, monkeypatch) -> None:
    from trainer.data.cache import Cache
    from trainer.session import Session

    real = Session.read

    def cache_emptied_at_step_2(self: Session, draws: object) -> dict[str, torch.Tensor]:
        if self.progress.step == 2:
            self.latents._shelf._kept.clear()
            monkeypatch.setattr(Cache, "get", lambda *_: None)
        return real(self, draws)

    monkeypatch.setattr(Session, "read", cache_emptied_at_step_2)
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT[1:])
    run = Run(tmp_path / "runs" / "tiny")
    assert outcome.code == 1 and "lost an entry while training" in outcome.err
    assert run.last_step() == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_on_a_terminal_a_line_tells_step_loss_speed_and_time_left(tiny_project, tmp_path, trainer) -> None:
    shown = on_a_terminal(lambda: trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT[1:]))
    lines = [line.split("\r\x1b[K")[-1] for line in re.split(r"(?=\r\x1b\[K)|\r?\n", shown)]
    steps = [line for line in lines if line.startswith("step ")]
    told = re.compile(r"step \d/6  loss \d\.\d{4}  \d+\.\d\d s/it  ETA \d+ s  \d\.\d GiB")
    assert all(told.fullmatch(line) for line in steps), steps
    assert [line[5] for line in steps] == list("123456")
    assert any(re.fullmatch(r"caching latents \d+/14", line) for line in lines)
    assert [line for line in lines if line][-1] == f"done at step 6: {tmp_path / 'runs/tiny/tiny.safetensors'}"


def on_a_terminal(act: object) -> str:
    """What `act` writes to stderr when that is a terminal of 80 columns."""
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    pieces: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(master, 4096):
                pieces.append(piece)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    kept = os.dup(2)
    os.dup2(slave, 2)
    try:
        assert act().code == 0  # type: ignore[operator]
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(slave)
        reader.join(10)
        os.close(master)
    return b"".join(pieces).decode()


def test_help_explains_every_option(capsys) -> None:
    from trainer.__main__ import main

    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    options = ("--preset", "--resume", "--gpus", "--set", "--name", "--workspace", "--check", "--json")
    assert all(option in shown for option in options)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_are_strangers_begin_no_run(tiny_project, tmp_path, trainer, monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, "2")
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT, "--set=memory.device=cpu")
    assert outcome.code == 1 and f"several processes were started ({variable}=2)" in outcome.err
    assert "MASTER_ADDR" in outcome.err and "start them by --gpus, accelerate launch or torchrun" in outcome.err
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(variable, "1")
    assert trainer("--preset", tiny_project, "--workspace", tmp_path, *SHORT, "--check").code == 0
