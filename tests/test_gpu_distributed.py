"""Two GPUs train one run, over NCCL: as one does with the same global batch, and without one of them too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_distributed import assert_alike, events
from tests.test_kill import PATIENCE, ROOT, wait_for_step
from trainer import checkpoint, several
from trainer.run import Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")]
EXACT = ["--set=train.precision=fp32", "--set=train.deterministic=true", "--set=memory.cuda_graphs=off"]


def command(preset: Path, workspace: Path, *words: str, name: str = "run") -> list[str]:
    return [sys.executable, "-m", "trainer", "--preset", str(preset), "--workspace", str(workspace), "--name", name,
            *words]


@pytest.mark.parametrize(("method", "shard"), [("lora", "off"), ("stella", "off"), ("stiefel", "off"), ("lora", "on"),
                                               ("stella", "on")])
def test_two_gpus_do_what_one_does(tiny_project: Path, tmp_path: Path, method: str, shard: str) -> None:
    """To the bit, holding the whole model each, and holding it together: a block that is read before it has come, or
    after another has taken its place, gives other numbers.  Both read one cache, since a kernel for half as many images
    to encode may round otherwise."""
    runs = []
    ways = {"one": ["--set=train.grad_accum=2"], "two": ["--gpus", "0,1", f"--set=memory.shard={shard}"]}
    for name, words in ways.items():
        done = subprocess.run(command(tiny_project, tmp_path, f"--set=adapter.method={method}", *EXACT, *words,
                                      name=name), cwd=ROOT, capture_output=True, text=True, timeout=300)
        runs.append(Run(tmp_path / "runs" / name))
        assert done.returncode == 0, done.stderr + runs[-1].log_tail()
    assert events(runs[1], "start")[0]["processes"] == 2
    assert checkpoint.last_progress(runs[1]).plan["shards"] == (2 if shard == "on" else 1)
    assert_alike(*runs, step=6, rounding=False)


@pytest.mark.parametrize("launcher", [["-m", "torch.distributed.run"], ["-m", "accelerate.commands.launch"]],
                         ids=["torchrun", "accelerate"])
def test_other_launchers_do(tiny_project: Path, tmp_path: Path, launcher: list[str]) -> None:
    count = "--nproc_per_node=2" if "torch" in launcher[1] else "--num_processes=2"
    words = command(tiny_project, tmp_path)[1:]
    done = subprocess.run([sys.executable, *launcher, count, *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    run = Run(tmp_path / "runs" / "run")
    assert done.returncode == 0, done.stderr + run.log_tail()
    assert run.state().word == "done" and events(run, "start")[0]["processes"] == 2


@pytest.mark.parametrize("chosen", ["memory.cuda_graphs=off", "memory.cuda_graphs=on", "memory.shard=on"])
def test_a_killed_process_leaves_a_whole_checkpoint_that_one_gpu_goes_on_from(tiny_project, tmp_path, chosen) -> None:
    """The survivor's GPU waits for the dead one for ever, with the update of a step behind that; a part of the model
    that the dead one kept stays readable."""
    words = command(tiny_project, tmp_path, "--set=train.steps=100000", "--set=output.save_every=0",
                    "--set=evaluate.every=0", "--set=log.rank_every=0", f"--set={chosen}")
    processes = [subprocess.Popen(words, cwd=ROOT, env=each) for each in several.environments(2, os.environ)]
    run = Run(tmp_path / "runs" / "run")
    try:
        wait_for_step(run, 20)  # as graphs by then
        processes[1].send_signal(signal.SIGKILL)
        assert processes[0].wait(60) == 1, run.log_tail()
    finally:
        for process in processes:
            process.kill()
            process.wait(PATIENCE)
    last = run.last_step()
    assert last >= events(run, "step")[-1]["step"] and f"saved up to step {last}" in run.state().text
    words = [sys.executable, "-m", "trainer", "--resume", str(run.path), f"--set=train.steps={last + 2}"]
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr + run.log_tail()
    assert run.state().word == "done" and all(event["loss"] for event in events(run, "step")[-2:])
