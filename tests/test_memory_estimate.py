"""The estimate against what the trainer's own session holds, on tiny models of every family."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from tests.bench import true_size
from tests.bench.true_size import SIZES
from trainer import families
from trainer.adapters import Target, build
from trainer.distributed import ALONE
from trainer.memory.blocks import repeated_blocks
from trainer.memory.estimate import BESIDE, UPDATE, UPDATE_FREE, Estimate, Estimator, held_weights
from trainer.memory.fetch import tensors_of
from trainer.memory.offload import Offload
from trainer.memory.plan import Plan
from trainer.memory.shards import Neighbours, Shards
from trainer.memory.trace import Alive, gpu_kernels
from trainer.optim import build_optimizer
from trainer.session import hold
from trainer.update import Update

CPU = torch.device("cpu")
GIB = 2**30


def traced(name: str, plan: Plan) -> tuple[int, Estimate]:
    """Bytes at the peak of a session's forward and backward pass, beside what it holds; and the estimate."""
    size = true_size.shrunk(SIZES[name])
    chosen = true_size.preset_of(size, "stella", 4)
    denoiser = true_size.denoiser_of(size, plan.quantize, CPU, torch.float32)
    session = true_size.session_of(size, chosen, denoiser, CPU, torch.float32)
    hold(session.family, denoiser, plan, CPU)
    leaves = list(session.adapter.leaves.values())
    held = [*denoiser.parameters(), *denoiser.buffers(), *leaves, *(leaf.grad for leaf in leaves)]
    with Alive(held) as alive, gpu_kernels():
        session.gradients(true_size.draws(size, 0))
    return alive.peak, Estimator(chosen, true_size.skeleton(size), torch.float32)(plan)


@pytest.mark.parametrize(("name", "plan"), [
    ("sd15", Plan("none", "full")), ("sdxl", Plan()), ("flux1-dev", Plan("fp8", "full")), ("flux1-dev", Plan()),
    ("sd15", Plan("none", "selective")), ("flux1-dev", Plan("none", "selective")),
    ("klein-4b", Plan("fp8", "selective")),
    ("klein-4b", Plan("none", "full")), ("klein-4b", Plan("fp8")), ("flux2-dev", Plan("fp8", "full"))], ids=str)
def test_a_step_holds_what_is_estimated(name: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.memory.estimate.WORKSPACE", 0)
    monkeypatch.setattr("trainer.memory.estimate.CONVOLUTIONS", 0)
    monkeypatch.setattr(Estimator, "_update", lambda estimator, trained: 0)  # in tiny models it would be the larger
    peak, estimate = traced(name, plan)
    assert estimate.step == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(("method", "optimizer", "retraction"), [
    ("lora", "adamw", "default"), ("lora", "sgd", "default"), ("lora", "scaled_adamw", "default"),
    ("stella", "adamw", "polar"), ("stella", "sgd", "exponential"), ("trilora", "adamw", "default"),
    ("stiefel", "stiefel", "default"), ("stiefel", "adamw", "default")])
@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_an_adapter_holds_what_is_estimated(method: str, optimizer: str, retraction: str, ema: float) -> None:
    size = true_size.shrunk(SIZES["klein-4b"])
    chosen = true_size.preset_of(size, method, 8, [f"adapter.retraction={retraction}", f"train.optimizer={optimizer}",
                                                   f"train.ema_decay={ema}"])
    denoiser = true_size.denoiser_of(size, "none", CPU, torch.float32)
    with Alive() as alive:
        session = true_size.session_of(size, chosen, denoiser, CPU, torch.float32)
        session.latents = session.texts = None
        gc.collect()
        held = alive.now
    estimate = Estimator(chosen, true_size.skeleton(size), torch.float32)(Plan())
    assert estimate.adapter == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize(("method", "retraction"), [
    ("lora", "default"), ("stella", "polar"), ("stella", "exponential"), ("stiefel", "default")])
def test_an_update_takes_no_more_than_is_estimated(method: str, retraction: str) -> None:
    sizes = [(512, 512)] * 8 + [(1024, 256)] * 4
    targets = [Target(f"layer{i}", nn.Linear(n, m, device="meta"), "all") for i, (m, n) in enumerate(sizes)]
    with Alive() as alive:
        adapter = build(targets, method=method, rank=16, retraction=retraction, device=CPU)
        optimizer = build_optimizer("stiefel" if method == "stiefel" else "adamw", adapter, lr=1e-3)
        update = Update(adapter, optimizer, 1.0)
        update(torch.zeros(()))
        gc.collect()
        alive.peak = held = alive.now
        update(torch.zeros(()))
    trained = sum(leaf.numel() for leaf in adapter.parameters())
    limit = UPDATE.get({"stiefel": "qr"}.get(method, retraction), UPDATE_FREE)
    assert (0 if method == "lora" else limit / 3) <= (alive.peak - held) / trained <= limit


@pytest.mark.parametrize(("method", "streams"), [("lora", 0), ("trilora", 3), ("stella", 3), ("stiefel", 0)])
def test_work_spaces_of_streams_are_counted_where_they_are_large(method: str, streams: int) -> None:
    size = true_size.shrunk(SIZES["klein-4b"])
    usual, exact = (Estimator(true_size.preset_of(size, method, 4, [f"train.deterministic={choice}"]),
                             true_size.skeleton(size), torch.float32)(Plan()).step for choice in ("false", "true"))
    assert exact - usual == streams * BESIDE


def test_several_processes_hold_their_gradients_once_more() -> None:
    size = true_size.shrunk(SIZES["klein-4b"])
    chosen = true_size.preset_of(size, "stella", 4)
    session = true_size.session_of(size, chosen, true_size.denoiser_of(size, "none", CPU, torch.float32), CPU,
                                   torch.float32)
    one, two = (Estimator(chosen, true_size.skeleton(size), torch.float32, processes=count)(Plan()).adapter
                for count in (1, 2))
    assert two - one == sum(leaf.grad.nbytes for leaf in session.adapter.parameters())


@pytest.mark.parametrize("mode", ["none", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("name", ["sdxl", "klein-4b"])
def test_weights_are_counted_as_they_will_be_held(name: str, mode: str) -> None:
    size = true_size.shrunk(SIZES[name])
    skeleton = true_size.skeleton(size)
    blocks = len(repeated_blocks(skeleton))
    denoiser = true_size.denoiser_of(size, mode, CPU, torch.bfloat16)
    there = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(denoiser))
    assert held_weights(skeleton, Plan(mode), torch.bfloat16) == (pytest.approx(there, rel=0.01), 0)
    offload = Offload(repeated_blocks(denoiser), blocks - 1, CPU)
    device, host = held_weights(skeleton, Plan(mode, "full", blocks - 1), torch.bfloat16)
    hosts = {block.host.untyped_storage().data_ptr() for block in offload.blocks}
    stays = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(denoiser)
                if tensor.untyped_storage().data_ptr() not in hosts)
    assert host == pytest.approx(offload.host_bytes, rel=0.35)  # tiny tensors are mostly filling
    assert device == pytest.approx(stays + 2 * offload.buffers[0].numel(), rel=0.25)


@pytest.mark.parametrize("mode", ["none", "fp8"])
def test_of_a_shared_model_each_gpu_holds_a_part_and_two_blocks(mode: str) -> None:
    size = true_size.shrunk(SIZES["klein-4b"])
    denoiser, shards = true_size.denoiser_of(size, mode, CPU, torch.bfloat16), Shards(Neighbours(ALONE, [0, 1]), CPU)
    for block in repeated_blocks(denoiser):
        shards.keep(block)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(denoiser)}
    buffers = 2 * max(block.size for block in shards.found.values())
    device, host = held_weights(true_size.skeleton(size), Plan(mode, "full", shards=2), torch.bfloat16)
    assert host == 0 and device == pytest.approx(sum(held.values()) + shards.kept + buffers, rel=0.25)


@pytest.mark.parametrize("name", list(SIZES))
def test_prompts_have_the_shapes_that_models_take(name: str) -> None:
    size = SIZES[name]
    shapes = families.get(size.family).prompt_shapes(true_size.config_of(size))
    assert shapes == {"prompt_embeds": size.prompt} | ({"pooled": (size.pooled,)} if size.pooled else {})


@pytest.mark.parametrize(("name", "plan", "limit"), [
    ("klein-4b", Plan("nf4", "full"), 6), ("klein-4b", Plan("none", "full"), 10), ("klein-9b", Plan("nf4", "full"), 9),
    ("sd15", Plan("none", "full"), 3.5)])
def test_true_sizes_fit_where_they_should(name: str, plan: Plan, limit: float) -> None:
    size = SIZES[name]
    estimate = Estimator(true_size.preset_of(size, "stella", 16), true_size.skeleton(size), torch.bfloat16)(plan)
    assert 0.4 * limit < estimate.peak / GIB <= limit
