"""Group norms that may run with channels last: elsewhere torch's own, and known to all that swaps classes."""

from __future__ import annotations

import torch

from tests.test_memory_selective import gradients, tiny
from trainer.fast import compile as block_compiler
from trainer.fast import group_norm
from trainer.fast.group_norm import ChannelsLastNorm
from trainer.memory import selective


def test_without_a_gpu_a_step_is_the_same_to_the_bit_and_selective_checkpointing_redoes_them() -> None:
    session, size = tiny("sd15:1", "lora", ())
    names, plain = list(session.denoiser.state_dict()), gradients(session, size)
    group_norm.install(session.denoiser)
    norms = [module for module in session.denoiser.modules() if isinstance(module, ChannelsLastNorm)]
    assert len(norms) > 20 and list(session.denoiser.state_dict()) == names
    assert all(map(torch.equal, gradients(session, size), plain))
    selective.install(session.denoiser)
    group_norm.install(session.denoiser)
    assert {type(norm) for norm in norms} == {selective.RemadeChannelsLastNorm}
    assert all(map(torch.equal, gradients(session, size), plain))
    selective.remove(session.denoiser)
    assert {type(norm) for norm in norms} == {ChannelsLastNorm}
    block_compiler.install(session.denoiser)
    assert {type(norm) for norm in norms} == {ChannelsLastNorm}
