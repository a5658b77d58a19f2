"""Waiting runs are files: nothing is lost, taken twice, or trained under another run's name."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.run_folders import PRESET, finished
from trainer import preset as presets
from trainer.errors import UserError
from trainer.queue import Queue

HOME = Path(__file__).parent.parent


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path)


def settled(tmp_path, *overrides):
    return presets.complete(presets.parse(PRESET, "p.toml", overrides), tmp_path)


def put(queue, *names):
    for name in names:
        queue.add(settled(queue.workspace), name)


def order(queue):
    return [entry.name for entry in queue.waiting()]


def files(queue):
    return sorted(path.relative_to(queue.folder).as_posix() for path in queue.folder.rglob("*.toml"))


def test_entries_stand_in_the_order_in_which_they_came(queue):
    put(queue, "b", "a", "c")
    assert order(queue) == ["b", "a", "c"] and files(queue) == ["0001-b.toml", "0002-a.toml", "0003-c.toml"]
    assert presets.load(queue.waiting()[0].path) == settled(queue.workspace)


def test_a_name_that_is_taken_waits_already_or_is_impossible_is_refused(queue):
    finished(queue.workspace, "done")
    put(queue, "a")
    for name in ("done", "a"):
        with pytest.raises(UserError, match="already a run called"):
            queue.add(settled(queue.workspace), name)
    with pytest.raises(UserError, match="cannot be a run's name"):
        queue.add(settled(queue.workspace), "../a")
    assert queue.add(settled(queue.workspace), None, "a").name == "a-2"
    assert queue.add(settled(queue.workspace), None, "done").name == "done-2"


@pytest.mark.parametrize(("place", "names"), [(1, "cabd"), (2, "acbd"), (3, "abcd"), (4, "abdc"), (99, "abdc"),
                                              (0, "cabd"), (-5, "cabd")])
def test_a_run_is_moved_to_any_place(queue, place, names):
    put(queue, *"abcd")
    queue.move("c", place)
    assert order(queue) == list(names) and len(files(queue)) == 4


def test_entries_that_were_left_with_one_number_are_moved_apart(queue):
    put(queue, *"abc")
    os.replace(queue.folder / "0002-b.toml", queue.folder / "0001-b.toml")
    assert order(queue) == ["a", "b", "c"]
    queue.move("b", 1)
    assert order(queue) == ["b", "a", "c"]


def test_two_files_of_one_name_are_not_moved_over_each_other(queue):
    put(queue, "a", "b")
    (queue.folder / "0003-a.toml").write_text("second")
    with pytest.raises(UserError, match="two runs of one name"):
        queue.move("b", 1)
    assert len(files(queue)) == 3


def test_cancel_takes_out_what_waits_and_only_that(queue):
    put(queue, "a", "b")
    with queue.claim() as entry:
        assert entry.name == "a"
        queue.cancel("b")
        for name in ("a", "b", "../a"):
            with pytest.raises(UserError, match="no run called .* is there in the queue"):
                queue.cancel(name)
    assert files(queue) == ["cancelled/0002-b.toml", "running/0001-a.toml"]


def test_the_last_cancelled_run_can_be_had_back_in_its_place(queue):
    put(queue, *"abcd")
    queue.cancel("b")
    queue.cancel("c")
    with pytest.raises(UserError, match="no run called 'b'"):
        queue.restore("b")
    queue.restore("c")
    assert order(queue) == ["a", "c", "d"] and len(files(queue)) == 3
    queue.cancel("c")
    finished(queue.workspace, "c")
    with pytest.raises(UserError, match="another run of that name"):
        queue.restore("c")


def test_what_was_claimed_is_nobody_elses_and_comes_first_when_its_runner_dies(queue):
    put(queue, "a", "b")
    with queue.claim() as mine, queue.claim() as other, queue.claim() as third:
        assert (mine.name, other.name, third) == ("a", "b", None)
    put(queue, "c")
    with queue.claim() as again:  # neither was finished
        assert again.name == "a"
        with queue.claim() as next_one:
            assert next_one.name == "b"


def test_a_failure_is_kept_told_and_dismissed(queue):
    put(queue, "a")
    with queue.claim() as entry:
        queue.fail(entry, "data.folder: pictures does not exist")
    assert queue.failures() == [("a", "data.folder: pictures does not exist")] and queue.names() == set()
    queue.dismiss("a")
    assert queue.failures() == [] and not list(queue.folder.rglob("0001*"))
    with pytest.raises(UserError, match="there is: none"):
        queue.dismiss("a")


def test_a_name_that_was_taken_while_it_waited_is_not_mistaken_for_its_own(queue):
    put(queue, "a")
    finished(queue.workspace, "a")
    with queue.claim() as entry:
        assert entry.name == "a-2" and entry.path.name == "0001-a-2.toml"


def test_files_that_are_no_entries_are_left_alone(queue):
    put(queue, "a")
    for name in ("notes.txt", "x.toml", "0002-.toml", "0003-con.toml", "0004- a.toml"):
        (queue.folder / name).write_text("?")
    assert order(queue) == ["a"]


def test_one_runner_a_gpu(queue):
    with queue.seat("GPU-1/x") as mine, queue.seat("") as cpu:
        assert mine and cpu and queue.is_served("GPU-1/x") and not queue.is_served("GPU-2") and queue.is_served()
        with queue.seat("") as second:
            assert not second
    assert not queue.is_served()


def claim_all(workspace, told):
    queue = Queue(workspace)
    while True:
        with queue.claim() as entry:
            if entry is None:
                return
            told.put(entry.name)
            time.sleep(0.002)
            entry.path.unlink()


def test_four_runners_at_once_take_each_entry_exactly_once(queue):
    put(queue, *(f"r{number}" for number in range(40)))
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=claim_all, args=(queue.workspace, told)) for _ in range(4)]
    for process in processes:
        process.start()
    taken = [told.get(timeout=60) for _ in range(40)]
    for process in processes:
        process.join(30)
    assert sorted(taken) == sorted(f"r{number}" for number in range(40)) and told.empty() and files(queue) == []


def test_kills_at_any_moment_lose_no_entry_and_free_every_lock(queue):
    put(queue, *"abcdef")
    program = ("import itertools, random, sys; from pathlib import Path; from trainer.queue import Queue\n"
               f"queue = Queue(Path({str(queue.workspace)!r})); print('ready', flush=True)\n"
               "for turn in itertools.count():\n"
               "    queue.move(random.choice('cdef'), random.randint(1, 6)) if turn % 20 else None\n"
               "    with queue.claim() as entry:\n"
               "        with queue.claim() as other: pass\n")
    queue.folder.joinpath("running").mkdir()
    for name in ("0001-a.toml", "0002-b.toml"):
        os.replace(queue.folder / name, queue.folder / "running" / name)
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=HOME, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.01 + 0.02 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert sorted([*order(queue), *(entry.name for entry in queue.begun())]) == list("abcdef")
    with queue.claim() as first, queue.claim() as second:
        assert (first.name, second.name) == ("a", "b")


def test_a_queue_that_another_program_holds_is_told(queue, monkeypatch):
    monkeypatch.setattr("trainer.queue.PATIENCE", 0.1)
    put(queue, "a")
    with FileLock(queue.folder / "locks" / "queue.lock"), pytest.raises(UserError, match="held by another program"):
        queue.cancel("a")


def test_a_resume_waits_moves_comes_back_and_keeps_its_name(queue):
    ours = finished(queue.workspace, "old")
    put(queue, "new")
    assert queue.add_resume(ours).resumes and order(queue) == ["new", "old"]
    with pytest.raises(UserError, match="old waits in the queue already"):
        queue.add_resume(ours)
    queue.move("old", 1)
    assert files(queue) == ["0001+old.toml", "0002-new.toml"]
    queue.cancel("old")
    queue.restore("old")
    assert order(queue) == ["old", "new"]
    with queue.claim() as entry:
        assert (entry.name, entry.resumes) == ("old", True) and files(queue)[1:] == ["running/0001+old.toml"]
    with queue.claim() as again:  # its runner was killed
        assert again == entry
        queue.fail(again, "out of luck")
    assert [tuple(failure) for failure in queue.failures()] == [("old", "out of luck")]
