"""Two processes train one run, over gloo: they do what one would, agree on everything, and lose nothing with a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forks import Forked, Server
from tests.test_kill import PATIENCE, ROOT, wait_for_step
from trainer import several
from trainer.__main__ import main
from trainer.control import Stopped
from trainer.distributed import ALONE, World, rebuilt, told
from trainer.errors import UserError
from trainer.events import Event, EventReader
from trainer.run import Run

LOSSES, WEIGHTS = 1e-5, 1e-4  # relative differences that rounding makes
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def start(server: Server, processes: int, *arguments: object) -> list[Forked]:
    """A run of one process or several."""
    if processes == 1:
        return [server.start(*arguments)]
    return [server.start(*arguments, environment=each) for each in several.environments(processes, {})]


def train(server: Server, preset: Path, workspace: Path, processes: int, *changes: str) -> Run:
    """A run to its end."""
    codes = [process.wait() for process in start(server, processes, *words_for(preset, workspace, *changes))]
    run = Run(workspace / "runs" / "run")
    assert codes == [0] * processes, run.log_tail()
    return run


def events(run: Run, kind: str) -> list[Event]:
    return [event for event in EventReader(run.events).read() if event["kind"] == kind]


def assert_alike(one: Run, other: Run, step: int, kinds: Collection[str] = ("step", "validation"),
                 rounding: bool = True) -> None:
    """The same losses and validation losses, and the same adapter after a step, within rounding or to the bit."""
    losses, weights, near_zero = (LOSSES, WEIGHTS, 1e-6) if rounding else (0.0, 0.0, 0.0)
    for kind in kinds:
        first, second = events(one, kind), events(other, kind)
        assert [event["step"] for event in first] == [event["step"] for event in second] != []
        for mine, theirs in zip(first, second):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=losses, abs=0.0), (kind, mine["step"])
    ours, others = (load_file(run.checkpoint(step) / "adapter.safetensors") for run in (one, other))
    assert ours.keys() == others.keys()
    for key, tensor in ours.items():
        if key.startswith(("leaf.", "ema.")):
            torch.testing.assert_close(tensor, others[key], rtol=weights, atol=near_zero, msg=key)
        elif key == "steps":
            assert torch.equal(tensor, others[key])


def launch(launcher: Sequence[str], *words: object) -> subprocess.Popen[bytes]:
    """Two processes by another program than ours."""
    return subprocess.Popen([sys.executable, "-m", *launcher, "-m", "trainer", *map(str, words)], cwd=ROOT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def words_for(preset: Path, workspace: Path, *changes: str) -> list[object]:
    return ["--preset", preset, "--workspace", workspace, "--name", "run", *(f"--set={change}" for change in changes)]


def test_two_processes_do_what_one_does_with_the_same_global_batch(server, tiny_project, tmp_path) -> None:
    """Losses, validation, pictures, distances and caches; of the two, each has a part of the work."""
    chosen = ["sample.every=3", f"sample.prompts={['a dog', 'x'] * 4 + ['y']}".replace("'", '"'), "sample.steps=1",
              "evaluate.distance=efflite0", "evaluate.generate=9"]
    processes = launch(ACCELERATE, *words_for(tiny_project, tmp_path / "two", *chosen))
    one = train(server, tiny_project, tmp_path / "one", 1, *chosen, "train.grad_accum=2")
    two = Run(tmp_path / "two" / "runs" / "run")
    assert processes.wait(PATIENCE) == 0, two.log_tail()
    assert_alike(one, two, 6)
    assert events(two, "start")[0]["processes"] == 2 and len(events(two, "start")) == 1
    assert [event["images"] for event in events(two, "sample")] == [event["images"] for event in events(one, "sample")]
    assert events(two, "image_loss")[0]["images"].keys() == events(one, "image_loss")[0]["images"].keys()
    assert {path.name for path in two.path.iterdir()} == {path.name for path in one.path.iterdir()}
    cached = [sorted(path.name for path in (run.path.parents[1] / "cache").rglob("??/*")) for run in (one, two)]
    assert cached[0] == cached[1] != []
    [first], [second] = events(one, "distance"), events(two, "distance")
    assert first["kid"] == pytest.approx(second["kid"], rel=1e-3, abs=1e-6)
    assert first["base_kid"] == pytest.approx(second["base_kid"], rel=1e-6)
    assert all(key.startswith("2 × ") for key in json.loads((tmp_path / "two" / "cache" / "speed.json").read_bytes()))


def test_a_shared_model_trains_as_a_whole_one_and_stops_and_goes_on_with_one_process(server, tiny_project,
                                                                                     tmp_path) -> None:
    """StelLA with DoRA, which reads all weights at each step; a stop is for both processes, and three are refused."""
    chosen = ["adapter.method=stella", "adapter.dora=true", "memory.shard=on", "train.lr_scheduler=constant",
              "evaluate.every=2"]
    processes = launch(TORCHRUN, *words_for(tiny_project, tmp_path / "two", *chosen, "train.steps=1000"))
    run = Run(tmp_path / "two" / "runs" / "run")
    wait_for_step(run, 2)
    run.request("stop")
    assert processes.wait(PATIENCE) == 0, run.log_tail()
    last = run.last_step()
    assert run.state().word == "stopped" and 2 <= last < 1000
    held = json.loads((run.checkpoint(last) / "progress.json").read_text())["plan"]
    assert held["shards"] == 2 and held["checkpointing"] == "full"
    assert 0 not in [process.wait() for process in start(server, 3, "--resume", run.path)]
    assert "4 images a step" in run.state().text and "resume it on 1 or 2" in run.state().text
    [again] = start(server, 1, "--resume", run.path, f"--set=train.steps={last + 2}")
    whole = train(server, tiny_project, tmp_path / "one", 1, *chosen, "train.grad_accum=2",
                  f"train.steps={last + 2}")
    assert again.wait() == 0 and run.state().word == "done", run.log_tail()
    assert_alike(whole, run, last + 2, {"step"})
    assert any("memory.shard = 'on' has nothing to do here" in event["text"] for event in events(run, "note"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_run_and_it_goes_on_with_one(server, tiny_project, tmp_path, victim) -> None:
    words = ["--preset", tiny_project, "--workspace", tmp_path, "--name", "run", "--set=train.steps=100000",
             "--set=output.save_every=7", "--set=evaluate.every=0", "--set=log.rank_every=0", "--set=memory.shard=on"]
    processes = start(server, 2, *words)
    run = Run(tmp_path / "runs" / "run")
    wait_for_step(run, 9)
    processes[victim].kill()
    assert processes[1 - victim].wait() == 1, run.log_tail()
    state, last = run.state(), run.last_step()
    if victim == 0:
        assert state.word == "crashed" and state.text == f"crashed; last saved at step {last}" and last % 7 == 0
    else:
        steps = [event["step"] for event in events(run, "step")]
        assert state.word == "failed" and last >= steps[-1]
        assert "another process of this run is gone" in state.text and f"saved up to step {last}" in state.text
        assert f"--resume {run.path}" in state.text
    [again] = start(server, 1, "--resume", run.path, f"--set=train.steps={last + 2}")
    assert again.wait() == 0, run.log_tail()
    assert run.state().word == "done" and run.last_step() == last + 2
    assert any("one process from here on, with train.grad_accum = 2" in event["text"] for event in events(run, "note"))


# Agreement, by threads in place of processes.


class Table:
    """Where the members of a small world exchange what they say; each exchange is a round."""

    def __init__(self, size: int) -> None:
        self.barrier, self.said = threading.Barrier(size, timeout=10), [None] * size

    def gather(self, rank: int, word: object) -> list[object]:
        self.said[rank] = word
        self.barrier.wait()
        found = list(self.said)
        self.barrier.wait()
        return found


class Member(World):
    """A world's member that speaks over a table."""

    def __init__(self, rank: int, size: int, table: Table) -> None:
        super().__init__()
        self.rank, self.size, self.first, self.table = rank, size, rank == 0, table

    def _gather(self, depth, error, result, group) -> list:  # noqa: ANN001
        return self.table.gather(self.rank, (depth, None if error is None else told(error), result))


def outcomes(size: int, work) -> list[object]:  # noqa: ANN001
    """What `work(member)` gives or raises in each member."""
    table, found = Table(size), [None] * size

    def be(rank: int) -> None:
        try:
            found[rank] = work(Member(rank, size, table))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_results_come_by_rank_and_parts_make_the_whole() -> None:
    assert outcomes(3, lambda member: member.together(lambda: member.part(list(range(7))))) == [
        [[0, 3, 6], [1, 4], [2, 5]]] * 3
    assert outcomes(2, lambda member: member.from_first(lambda: member.rank + 5)) == [5, 5]
    assert outcomes(2, lambda member: sorted(member.union({f"r{member.rank}"}))) == [["r0", "r1"]] * 2
    assert ALONE.together(lambda: 3) == [3] and ALONE.part([1, 2]) == [1, 2]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_fault_at_any_depth_ends_the_same_work_in_all(depth: int) -> None:
    """The last member fails before it comes to the deeper calls in which the others wait."""

    def work(member: World) -> str:
        def level(number: int) -> None:
            if member.rank == member.size - 1 and number == depth:
                raise UserError(f"no room at level {number}")
            if number < 3:
                member.together(lambda: level(number + 1))

        try:
            member.together(lambda: level(1))
        except UserError as error:
            return f"{error}, then {member.together(lambda: member.rank)}"  # they are in step again
        return "nothing happened"

    assert outcomes(3, work) == [f"no room at level {depth}, then [0, 1, 2]"] * 3


def test_a_fault_is_caught_where_work_may_fail_and_the_rest_goes_on() -> None:
    def work(member: World) -> list[str]:
        seen = []

        def outer() -> None:
            try:
                member.together(lambda: 1 / member.rank)  # the first one fails, inside
            except (ZeroDivisionError, RuntimeError) as error:
                seen.append(type(error).__name__)
            seen.append(str(member.together(lambda: member.rank)))

        member.together(outer)
        return seen

    assert outcomes(2, work) == [["ZeroDivisionError", "[0, 1]"], ["RuntimeError", "[0, 1]"]]


def test_what_is_told_of_a_fault_is_what_it_was() -> None:
    assert isinstance(rebuilt(told(Stopped())), Stopped)
    assert isinstance(rebuilt(told(torch.OutOfMemoryError("full"))), torch.OutOfMemoryError)
    assert isinstance(rebuilt(told(UserError("do this"))), UserError) and str(rebuilt(told(UserError("do this")))) == \
        "do this"
    assert str(rebuilt(told(ValueError("odd")))) == "ValueError: odd"


def test_no_connection_closes_before_every_process_has_come_to_its_end(monkeypatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr("torch.distributed.new_group", lambda **options: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group",
                        lambda: closed.append(threading.current_thread().name))
    store = torch.distributed.HashStore()
    members = [World(rank, 2, rank, store) for rank in range(2)]
    first = threading.Thread(target=members[0].close, name="first")
    first.start()
    first.join(0.3)
    assert closed == []
    second = threading.Thread(target=members[1].close, name="second")
    second.start()
    for thread in (first, second):
        thread.join(20)
    assert sorted(closed) == ["first", "second"]


def test_a_process_that_never_comes_to_its_end_does_not_hold_up_the_others(monkeypatch) -> None:
    monkeypatch.setattr("torch.distributed.new_group", lambda **options: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("trainer.distributed.AT_THE_END", timedelta(seconds=0.2))
    World(0, 2, 0, torch.distributed.HashStore()).close()


@pytest.mark.parametrize(("said", "sharing"), [("2", 2), ("", 4)])
def test_a_machines_cores_are_shared_by_its_own_processes_alone(tiny_project, tmp_path, monkeypatch, said,
                                                                sharing) -> None:
    """Two machines with two processes each; a launcher that does not say how many are here is believed the most."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": said,
                        "MASTER_ADDR": "none", "MASTER_PORT": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
                        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}.items():
        monkeypatch.setenv(name, value)
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *where, **options: iter([(store, 0, 4)]))
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *what, **options: None)
    monkeypatch.setattr(World, "together", lambda self, work, quick=False: [work()])
    shared: list[int] = []

    def use_cores(number: int) -> None:
        shared.append(number)
        raise UserError("that is enough")

    monkeypatch.setattr("trainer.gpu.use_cores", use_cores)
    assert main([str(word) for word in words_for(tiny_project, tmp_path)]) == 1
    assert shared == [sharing]
