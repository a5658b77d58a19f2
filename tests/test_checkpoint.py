"""Checkpoints: exact to the bit, whole or not there, and few."""

import errno
import json
import os
import shutil

import pytest
import torch
from torch import Tensor

from tests.tiny import METHODS, OPTIMIZER, adapted, train
from trainer import checkpoint, files
from trainer import run as runs
from trainer.checkpoint import Progress
from trainer.errors import UserError
from trainer.optim import build_optimizer
from trainer.run import Run

PROGRESS = Progress(step=7, seconds=0.1 + 0.2, global_batch=4, data="f00d", validation={"0": 0.1, "7": 1 / 3})


@pytest.fixture
def run(tmp_path):
    return runs.create(tmp_path, "cat", "")


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit by bit, so that -0.0 is not 0.0 and a NaN is itself."""
    def raw(tensors: dict[str, Tensor]) -> dict:
        return {key: (value.dtype, tuple(value.shape), value.cpu().contiguous().flatten().view(torch.uint8).tolist())
                for key, value in tensors.items()}

    return raw(one) == raw(other)


def put(run: Run, *steps: int) -> None:
    for step in steps:
        checkpoint.save(run, Progress(step), {"up": torch.full((2, 2), float(step))}, {})
        files.write_atomic(run.export_of(step), b"x")


def everything(run: Run) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_tensors_of_every_type_come_back_to_the_bit(run):
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45, 1 / 3])
    odd.view(torch.int32)[2] = 0x7FC01234  # a NaN that carries something
    adapter = {"odd": odd, "half": odd.half(), "bf16": odd.bfloat16(), "double": odd.double(),
               "scalar": torch.tensor(3.5), "turned": torch.arange(6.0).reshape(2, 3).T, "empty": torch.zeros(0, 4),
               "slice": torch.arange(9.0)[2:5]}
    optimizer = {"0.0.step": torch.tensor(7), "0.0.state1": torch.arange(255).to(torch.uint8),
                 "0.0.flag": torch.tensor([True, False]), "0.0.exp_avg": adapter["odd"]}
    size = checkpoint.save(run, PROGRESS, adapter, optimizer)
    progress, got_adapter, got_optimizer = checkpoint.load(run.checkpoint(7))
    assert progress == PROGRESS
    assert same_bits(got_adapter, adapter) and same_bits(got_optimizer, optimizer)
    assert size == sum(len(content) for name, content in everything(run).items() if name.startswith("checkpoints"))


def test_tensors_that_share_memory_are_saved_each_by_itself(run):
    whole = torch.arange(6.0)
    checkpoint.save(run, PROGRESS, {"whole": whole, "view": whole[2:], "again": whole}, {})
    assert same_bits(checkpoint.load(run.checkpoint(7))[1], {"whole": whole, "view": whole[2:], "again": whole})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer_name", ["the method's", "sgd"])
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(run, method, optimizer_name):
    def fresh() -> tuple:
        torch.manual_seed(1)
        net, adapter = adapted(method)
        name = OPTIMIZER[method] if optimizer_name == "the method's" else optimizer_name
        return net, adapter, build_optimizer(name, adapter, lr=1e-2)

    net, adapter, optimizer = fresh()
    train(net, adapter, optimizer, range(5))
    checkpoint.save(run, PROGRESS, adapter.state_dict(), optimizer.state_dict())
    train(net, adapter, optimizer, range(5, 10))

    net2, adapter2, optimizer2 = fresh()
    _, state, optimizer_state = checkpoint.load(run.checkpoint(7))
    adapter2.load_state_dict(state)
    optimizer2.load_state_dict(optimizer_state)
    train(net2, adapter2, optimizer2, range(5, 10))
    assert same_bits(adapter2.state_dict(), adapter.state_dict())
    assert same_bits(optimizer2.state_dict(), optimizer.state_dict())


def test_a_step_that_has_its_checkpoint_is_not_written_again(run):
    put(run, 5)
    before = everything(run)
    assert checkpoint.save(run, Progress(5), {"up": torch.zeros(9)}, {}) > 0
    assert everything(run) == before


def test_a_save_clears_away_what_a_killed_one_left(run):
    left = run.checkpoints / ".step_000005.tmp"
    left.mkdir(parents=True)
    (left / "junk").write_text("x")
    put(run, 5)
    assert run.checkpoint_steps() == [5] and not (run.checkpoint(5) / "junk").exists() and not left.exists()


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_nothing_behind_and_the_older_ones_whole(run, monkeypatch, call):
    put(run, 5)
    before = everything(run)

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, call, full)
        put(run, 6)
    assert everything(run) == before and [path.name for path in run.checkpoints.iterdir()] == ["step_000005"]
    put(run, 6)
    assert run.checkpoint_steps() == [5, 6]


def test_a_file_that_the_system_cuts_short_is_an_os_error_too(run):
    """The system itself refuses to write more, inside the library that writes tensors."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on file sizes")
    put(run, 5)
    before = everything(run)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
        with pytest.raises(OSError, match="os error 27|File too large"):
            checkpoint.save(run, Progress(6), {"up": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert everything(run) == before and not list(run.checkpoints.glob(".*"))


FILES = ("adapter.safetensors", "optimizer.safetensors", "progress.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"", b"[]", b'"x"', b"{}", "half", b'{"format": 1, "what": 2}',
                                     b'{"format": null}'])
def test_a_damaged_checkpoint_is_told_with_the_way_out(run, name, content):
    put(run, 5)
    file = run.checkpoint(5) / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20] if content == "half" else content)
    with pytest.raises(UserError) as caught:
        checkpoint.load(run.checkpoint(5))
    start, end = f"{run.checkpoint(5)} is damaged (", "); delete that folder to resume from the one before"
    assert str(caught.value).startswith(start) and str(caught.value).endswith(end)


def test_a_checkpoint_of_a_later_program_is_refused(run):
    put(run, 5)
    file = run.checkpoint(5) / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": checkpoint.FORMAT + 1, "new": True}))
    with pytest.raises(UserError) as caught:
        checkpoint.load(run.checkpoint(5))
    assert str(caught.value) == (f"{run.checkpoint(5)} was written by a newer version of this program; "
                                 "update it to go on")


def test_a_checkpoint_of_an_earlier_program_says_nothing_of_how_the_model_was_held(run):
    put(run, 5)
    file = run.checkpoint(5) / "progress.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: stored[key] for key in stored if key not in ("plan", "text_quantize")}
                               | {"format": 1}))
    assert checkpoint.load(run.checkpoint(5))[0] == checkpoint.last_progress(run)
    assert (checkpoint.last_progress(run).plan, checkpoint.last_progress(run).text_quantize) == ({}, "none")


def test_how_far_a_run_is_can_be_told_without_its_tensors(run):
    assert checkpoint.last_progress(run) is None
    put(run, 5)
    (run.checkpoint(5) / "adapter.safetensors").unlink()
    assert checkpoint.last_progress(run).step == 5


def test_the_last_the_best_and_the_pinned_stay_with_their_exports(run):
    put(run, *range(1, 9))
    run.pin(2, True)
    assert checkpoint.prune(run, 3, best={4}) == [1, 3, 5]
    assert run.checkpoint_steps() == [2, 4, 6, 7, 8]
    assert [step for step in range(1, 9) if run.export_of(step).exists()] == [2, 4, 6, 7, 8]
    assert checkpoint.prune(run, 3, best={4}) == []


def test_a_best_that_is_among_the_last_takes_no_place_of_theirs(run):
    put(run, 1, 2, 3)
    assert checkpoint.prune(run, 2, best={3, -1}) == [1]


def test_fewer_checkpoints_than_are_kept_all_stay(run):
    assert checkpoint.prune(run, 3) == []
    put(run, 1, 2)
    assert checkpoint.prune(run, 3) == [] and run.checkpoint_steps() == [1, 2]


def test_what_a_kill_left_half_done_is_cleared_away(run):
    checkpoint.remove_remains(run)  # a run that never saved has no folder for it
    put(run, 5)
    shutil.copytree(run.checkpoint(5), run.checkpoints / ".step_000006.tmp")
    checkpoint.remove_remains(run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000005"]
