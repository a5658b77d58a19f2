"""Whole runs over a base in few bits: every family and method trains, resumes to the bit, and fits diffusers."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests import family_runs, projects
from trainer.events import EventReader
from trainer.run import Run

STEPS = 10
LAYERS = {"sd15": 160, "sdxl": 170, "flux1": 34, "flux2": 28}  # of attention and feed-forward
SETTINGS = [f"train.steps={STEPS}", f"output.save_every={STEPS // 2}", "evaluate.every=0", "sample.prompts=[]",
            'adapter.targets=["attention", "feed_forward"]']


class Project(NamedTuple):
    family: str
    preset: Path
    base: Path
    workspace: Path
    losses: dict[str, list[float]]  # of the runs made so far, by name


@pytest.fixture(scope="module", params=family_runs.MAKERS)
def project(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = family_runs.MAKERS[request.param](folder / "base")
    preset = family_runs.project(folder, request.param, base)
    return Project(request.param, preset, base, folder / "workspace", {})


def losses_of(run: Run) -> list[float]:
    return [event["loss"] for event in EventReader(run.events).read() if event["kind"] == "step"]


@pytest.mark.parametrize(("method", "mode"), [*product(["lora", "stiefel", "stella"], ["bf16", "int8", "nf4"]),
                                              ("stella", "fp8")])
def test_a_run_over_a_base_in_few_bits_resumes_exactly_and_fits_diffusers(project, method, mode):
    held = "train.precision=bf16" if mode == "bf16" else f"memory.quantize={mode}"
    overrides = [f"adapter.method={method}", held, *SETTINGS]
    run = family_runs.train(project.preset, project.workspace, f"{method}-{mode}", *overrides)
    losses = losses_of(run)
    assert family_runs.event(run, "end")["reason"] == "done"
    assert len(losses) == STEPS and all(0 < loss < 100 for loss in losses)
    assert losses not in project.losses.values()  # each base is another
    project.losses[run.name] = losses
    exported = family_runs.event(run, "export")
    assert exported["unmatched"] == [] and exported["worst_rel_error"] < 1e-6
    family_runs.assert_resume_is_exact(run)
    family_runs.assert_diffusers_has_our_weights(run, project.preset, project.base,
                                                 "unet" if project.family in ("sd15", "sdxl") else "transformer",
                                                 *overrides, layers=LAYERS[project.family])


def test_captions_of_one_precision_are_not_taken_for_those_of_another(project):
    overrides = [*family_runs.SMALL, *SETTINGS]
    found = {}
    for mode in ("none", "int8", "nf4"):
        session = projects.session(project.preset, project.workspace, *overrides,
                                   f"memory.quantize_text_encoder={mode}", name=f"text-{mode}")
        found[mode] = session.conditioning([""])["prompt_embeds"]
    for mode, allowed in (("int8", 0.05), ("nf4", 0.4)):
        assert 0 < (found[mode] - found["none"]).norm() <= allowed * found["none"].norm()
    assert not torch.equal(found["int8"], found["nf4"])
