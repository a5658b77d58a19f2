"""A model shared by several processes: the same numbers to the bit, no weights beside one's own part and two blocks,
and nobody waits for anybody.  Threads take the processes' place."""

from __future__ import annotations

import pytest
import torch

from tests.test_distributed import Member, outcomes
from tests.test_memory_offload import DEPTH, make, trained
from trainer import preset as presets
from trainer.adapters.layer import base_matrix
from trainer.distributed import ALONE
from trainer.errors import UserError
from trainer.families import sd15
from trainer.memory.blocks import repeated_blocks
from trainer.memory.fetch import BUFFERS, tensors_of
from trainer.memory.shards import FileParts, Neighbours, Shards, meet, nothing, try_out
from trainer.session import open_base

CPU = torch.device("cpu")


def bytes_of(model: torch.nn.Module) -> int:
    """What the model's tensors take, each storage once."""
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(model)}
    return sum(held.values())


def share(member: Member, model: torch.nn.Module) -> Shards:
    shards = Shards(meet(member, CPU), CPU)
    for block in model.transformer_blocks:
        shards.keep(block)
    shards.open(list(model.transformer_blocks))
    return shards


@pytest.mark.parametrize("mode", ["none", "fp8"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_shared_model_computes_the_same_to_the_bit(mode: str, size: int) -> None:
    models = [make(mode) for _ in range(size + 1)]
    expected, whole = trained(*models[0]), bytes_of(models[0][0])

    def work(member: Member) -> tuple[list[torch.Tensor], int, int]:
        model, adapter = models[member.rank]
        shards = share(member, model)
        found = [shards.kept, bytes_of(model)]
        return trained(model, adapter, 2), *found

    for found, kept, beside in outcomes(size, work):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert whole / size <= kept < 1.2 * whole / size and beside < 0.01 * whole


def test_a_process_that_does_more_than_the_others_waits_for_none() -> None:
    """Pictures are drawn by one process and not by another, and one may be out of memory."""
    models = [make() for _ in range(2)]

    def work(member: Member) -> int:
        model, adapter = models[member.rank]
        shards = share(member, model)
        for _ in range(3 if member.rank else 0):
            with torch.no_grad():
                assert model(torch.ones(1, model.width)).isfinite().all()
        assert sum(held is not None for held in shards.held) == (BUFFERS if member.rank else 0)
        return len(shards.blocks)

    assert outcomes(2, work) == [DEPTH, DEPTH]


def test_weights_are_there_for_those_that_read_them_between_passes() -> None:
    models = [make() for _ in range(3)]
    expected = [block.adapted.weight.clone() for block in models[2][0].transformer_blocks]

    def work(member: Member) -> list[bool]:
        model, adapter = models[member.rank]
        share(member, model)
        assert model.transformer_blocks[1].adapted.weight.isnan().all()  # nobody takes it for a weight
        return [torch.equal(base_matrix(target), weight)
                for target, weight in zip(adapter.layout.targets, expected)]

    assert outcomes(2, work) == [[True] * DEPTH] * 2


def test_no_more_than_one_block_is_whole_while_weights_are_loaded(tiny_project) -> None:
    base = open_base(presets.load(tiny_project))
    shards, seen = Shards(Neighbours(ALONE, [0, 1]), CPU), []

    def keep(block: torch.nn.Module) -> None:
        seen.append(block)
        assert not any(tensor.is_meta for tensor in tensors_of(block))
        shards.keep(block)
        assert bytes_of(block) <= 4 * sum(1 for _ in tensors_of(block))

    denoiser = sd15.load_denoiser(base, CPU, torch.float32, "fp8", keep)
    assert {id(block) for block in seen} == {id(block) for block in repeated_blocks(denoiser)}
    whole = sd15.load_denoiser(base, CPU, torch.float32, "fp8")
    kept = bytes_of(whole) - bytes_of(denoiser)
    assert kept / 2 < shards.kept < 0.7 * kept
    beside = [name for name in denoiser.state_dict() if "transformer_blocks" not in name]
    assert all(torch.equal(denoiser.state_dict()[name], whole.state_dict()[name]) for name in beside) and beside


def test_one_process_of_a_computer_shares_nothing() -> None:
    [error] = outcomes(1, lambda member: meet(member, CPU))
    assert "it needs two GPUs or more in each computer" in str(error)


def test_what_keeps_one_from_sharing_is_told_in_all_and_they_stay_in_step() -> None:
    class Unable(FileParts):
        def put(self, part: torch.Tensor) -> None:
            if self.neighbours.place == 1:
                raise ImportError("no such memory")
            super().put(part)

    def work(member: Member) -> tuple[str, list[int]]:
        neighbours = Neighbours(member, [0, 1])
        try_out(neighbours, FileParts(neighbours), CPU)
        with pytest.raises(UserError, match="cannot be read from other processes here") as told:
            try_out(neighbours, Unable(neighbours), CPU)
        return "no such memory" in str(told.value), member.together(lambda: member.rank)

    assert outcomes(2, work) == [(True, [0, 1])] * 2


def test_what_stands_for_absent_weights_is_sent_to_a_device_once() -> None:
    assert nothing(torch.bfloat16, CPU) is nothing(torch.bfloat16, CPU)
    assert nothing(torch.float8_e4m3fn, CPU).float().isnan() and nothing(torch.int8, CPU) == 0


def test_neighbours_speak_by_place() -> None:
    assert outcomes(2, lambda member: Neighbours(member, [0, 1]).all(member.rank + 5)) == [[5, 6]] * 2
