"""What a trainer holds: a loss of the draws alone, text from the cache, weights by name, a resumed state."""

from __future__ import annotations

import pytest
import torch

from tests import projects
from trainer import preset as presets
from trainer import setup
from trainer.distributed import World
from trainer.errors import UserError
from trainer.events import EventReader
from trainer.loop import run_training
from trainer.session import Session, pick_device, pick_dtype

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def session(tiny_project, tmp_path_factory) -> Session:
    return projects.session(tiny_project, tmp_path_factory.mktemp("session"))


def test_a_loss_depends_on_its_draws_alone(session) -> None:
    draws = session.order.batch(0)
    session.use("raw")
    first = session.loss(draws)
    torch.manual_seed(123)
    assert torch.equal(first, session.loss(draws))
    assert not torch.equal(first, session.loss(session.order.batch(1)))


def test_the_mean_of_micro_batches_is_the_loss_of_the_whole(session) -> None:
    draws = session.order.batch(0)
    session.use("raw")
    parts = torch.stack([session.loss([draw]) for draw in draws]).mean()
    torch.testing.assert_close(parts, session.loss(draws), rtol=1e-5, atol=1e-6)


def test_only_the_adapter_gets_gradients(session) -> None:
    session.use("raw")
    session.backward(session.loss(session.order.batch(0)))
    assert any(leaf.grad.abs().sum() > 0 for leaf in session.adapter.parameters())
    assert all(parameter.grad is None for parameter in session.denoiser.parameters())
    session.adapter.zero_grad()


def test_scaling_against_underflow_leaves_the_gradient_as_it_is(session) -> None:
    gradients = []
    for dtype in (torch.float16, torch.float32):
        session.use("raw")
        loss = session.loss(session.order.batch(0))
        session.dtype = dtype  # fp16 is scaled; the arithmetic is done, so that only this differs
        session.backward(loss)
        gradients.append([leaf.grad.clone() for leaf in session.adapter.parameters()])
        session.adapter.zero_grad()
        session.dtype = torch.float32
    for scaled, plain in zip(*gradients):
        torch.testing.assert_close(scaled, plain)


def test_a_new_prompt_is_encoded_once_and_then_known(session) -> None:
    with pytest.raises(UserError, match="lost an entry"):
        session.conditioning(["never seen"])
    session.encode_new(["never seen"])
    shapes = [session.conditioning([text])["prompt_embeds"].shape for text in ("never seen", "")]
    assert shapes[0] == shapes[1]


def test_the_weights_shown_are_the_average_when_there_is_one(session, tiny_project, tmp_path) -> None:
    assert session.shown_weights == "ema"
    session.preset = session.preset.model_copy(
        update={"output": session.preset.output.model_copy(update={"weights": "raw"})})
    assert session.shown_weights == "raw"


def test_without_the_adapter_the_model_is_the_base(session) -> None:
    latents, noise = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    timesteps, text = torch.tensor([10]), session.conditioning([""])
    with torch.no_grad():
        session.use("off")
        plain = session.predict(latents, noise, timesteps, text)
        for leaf in session.adapter.parameters():
            leaf.add_(0.1)
        assert torch.equal(plain, session.predict(latents, noise, timesteps, text))
        session.use("raw")
        assert not torch.equal(plain, session.predict(latents, noise, timesteps, text))


def test_new_prompts_are_encoded_in_the_hosts_memory_where_the_gpus_does_not_suffice(tiny_project, tmp_path,
                                                                                     monkeypatch) -> None:
    session, asked = projects.session(tiny_project, tmp_path), []
    real = session.family.load_text_encoder
    monkeypatch.setattr(session, "text_quantize", "nf4")

    def load(base: object, device: torch.device, dtype: torch.dtype, quantize: str) -> torch.nn.Module:
        asked.append(quantize)
        if quantize != "none":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, device, dtype, quantize)

    monkeypatch.setattr(session.family, "load_text_encoder", load)
    session.encode_new(["something new"])
    session.encode_new(["something new"])
    assert asked == ["nf4", "none"]


def test_a_resume_says_when_the_images_changed(own_project, tmp_path) -> None:
    first = projects.session(own_project, tmp_path)
    first.recorder.close()
    preset = presets.load(own_project, ["train.steps=2", "sample.prompts=[]"])
    run_training(first.run, preset, tmp_path)
    (own_project.parent / "train" / "001.txt").write_text("another caption")
    resumed = projects.session(own_project, tmp_path)
    assert resumed.progress.step == 2
    notes = [event["text"] for event in EventReader(resumed.run.events).read() if event["kind"] == "note"]
    assert notes[-1].startswith("the data set changed since this run was last trained")
    assert resumed.progress.data == resumed.material.fingerprint()


def test_setting_up_stops_when_it_is_asked_to(tiny_project, tmp_path, monkeypatch) -> None:
    class Asked(Exception):
        pass

    def guard() -> None:
        raise Asked

    real = setup.set_up
    monkeypatch.setattr(projects, "set_up", lambda *arguments: real(*arguments[:-1], guard))
    with pytest.raises(Asked):
        projects.session(tiny_project, tmp_path)


@pytest.mark.parametrize("device, message", [("cuda:99", "torch sees"), ("mps", "no Apple GPU")])
def test_a_device_that_is_not_here_is_told(tiny_project, device, message) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    with pytest.raises(UserError, match=message):
        pick_device(presets.load(tiny_project, [f"memory.device={device}"]))


@pytest.mark.parametrize(("seen", "device"), [(2, "cuda:1"), (4, "cuda:3")])
def test_each_process_has_its_own_of_the_gpus_that_a_preset_names(tiny_project, monkeypatch, seen, device) -> None:
    """They are numbered anew where a process sees no others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    world = World()
    world.size, world.local_rank = 2, 1
    assert pick_device(presets.load(tiny_project, ["memory.device=cuda:2,3"]), world) == torch.device(device)
    world.local_rank = 2
    with pytest.raises(UserError, match="'cuda:2,3' names 2 devices, and this run has 2 processes; choose 'auto'"):
        pick_device(presets.load(tiny_project, ["memory.device=cuda:2,3"]), world)


def test_one_gpu_chosen_in_place_of_several_that_a_preset_names_is_the_first_that_is_seen(tiny_project, monkeypatch
                                                                                          ) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as --gpus leaves it
    assert pick_device(presets.load(tiny_project, ["memory.device=cuda:2,3"])) == torch.device("cuda:0")
    assert pick_device(presets.load(tiny_project, ["memory.device=cuda:0,0"])) == torch.device("cuda:0")


def test_a_cpu_computes_in_fp32_unless_told_otherwise(tiny_project) -> None:
    assert pick_device(presets.load(tiny_project, ["memory.device=cpu"])) == CPU
    assert pick_dtype(presets.load(tiny_project), CPU) == torch.float32
    assert pick_dtype(presets.load(tiny_project, ["train.precision=bf16"]), CPU) == torch.bfloat16
