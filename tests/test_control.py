"""How a trainer is asked to stop: by file, by SIGTERM, by SIGINT, and at once by a second SIGINT."""

import os
import signal
import subprocess
import sys

import pytest

from trainer import run as runs
from trainer.control import Requests, Stopped
from trainer.run import Run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these signals are POSIX's")

# Steps until it is asked to stop; "slow" stands for a step that never ends.
TRAINER = """
import sys, time
from pathlib import Path
from trainer.control import Requests
from trainer.run import Run
with Requests(Run(Path(sys.argv[1]))) as requests:
    print("ready", flush=True)
    while not requests.stop_asked():
        time.sleep(0.005)
    print("stopping", flush=True)
    if sys.argv[2] == "slow":
        time.sleep(60)
print("stopped", flush=True)
"""


@pytest.fixture
def run(tmp_path):
    return runs.create(tmp_path, "cat", "")


def trainer(run: Run, pace: str = "quick") -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", TRAINER, str(run.path), pace], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_trainer_after_its_step(run, number):
    process = trainer(run)
    process.send_signal(number)
    assert process.communicate(timeout=20) == (b"stopping\nstopped\n", b"")
    assert process.returncode == 0


def test_a_file_ends_a_trainer_after_its_step(run):
    process = trainer(run)
    run.request("stop")
    assert process.communicate(timeout=20) == (b"stopping\nstopped\n", b"")
    assert process.returncode == 0 and not run.asked("stop")


def test_a_second_interrupt_ends_it_at_once(run):
    process = trainer(run, "slow")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"stopping\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out, err.splitlines()[-1], process.returncode) == (b"", b"KeyboardInterrupt", -signal.SIGINT)


@pytest.mark.parametrize("first", ["SIGTERM", "a file"])
def test_an_interrupt_after_another_request_is_still_the_first(run, first):
    with Requests(run) as requests:
        if first == "a file":
            run.request("stop")
            assert requests.stop_asked()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.stop_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_once_asked_for_stays(run):
    with Requests(run) as requests:
        assert not requests.stop_asked()
        run.request("stop")
        assert requests.stop_asked() and not run.asked("stop")
        assert requests.stop_asked()


def test_long_work_is_left_when_a_stop_is_asked_for(run):
    with Requests(run) as requests:
        requests.guard()
        run.request("stop")
        for _ in range(2):
            with pytest.raises(Stopped):
                requests.guard()


def test_a_pause_is_no_stop(run):
    with Requests(run) as requests:
        run.request("pause")
        assert not requests.stop_asked()


def test_the_signals_are_given_back(run):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), Requests(run):
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
