"""The ladder of plans: in what order memory is saved, and what a preset keeps out of it."""

import pytest

from trainer.errors import UserError
from trainer.memory.plan import Plan, below, for_gpus, plain, rungs, text_rungs
from trainer.schema import Adapter, Data, Memory, Model, Preset, Train


def preset(dora: bool = False, **memory: object) -> Preset:
    return Preset(model=Model(family="flux1", base="b"), data=Data(folder="d"), train=Train(steps=1),
                  adapter=Adapter(dora=dora), memory=Memory(**memory))


NF4 = [Plan("nf4", "full", count) for count in (8, 16, 23)]
SELECTIVE = Plan(checkpointing="selective")


def test_everything_left_open_goes_from_the_fastest_to_the_most_sparing() -> None:
    levels = [Plan(mode, level) for mode in ("none", "fp8", "nf4") for level in ("none", "selective", "full")]
    assert rungs(preset(), 24) == [*levels, *NF4]


@pytest.mark.parametrize(("fixed", "ladder"), [
    ({"quantize": "none"}, [Plan(), SELECTIVE, *(Plan("none", "full", count) for count in (0, 8, 16, 23))]),
    ({"quantize": "int8", "offload_blocks": 0}, [Plan("int8"), Plan("int8", "selective"), Plan("int8", "full")]),
    ({"gradient_checkpointing": "selective"}, [SELECTIVE, Plan("fp8", "selective"), Plan("nf4", "selective")]),
    ({"gradient_checkpointing": "none"}, [Plan(), Plan("fp8"), Plan("nf4")]),
    ({"gradient_checkpointing": "full"}, [Plan("none", "full"), Plan("fp8", "full"), Plan("nf4", "full"), *NF4]),
    ({"offload_blocks": 5}, [Plan(mode, "full", 5) for mode in ("none", "fp8", "nf4")]),
    ({"quantize": "fp8", "gradient_checkpointing": "full", "offload_blocks": 2}, [Plan("fp8", "full", 2)]),
    ({"quantize": "nf4", "gradient_checkpointing": "none", "offload_blocks": 0}, [Plan("nf4")]),
])
def test_what_a_preset_fixes_stays_fixed(fixed: dict, ladder: list[Plan]) -> None:
    assert rungs(preset(**fixed), 24) == ladder


def test_several_gpus_share_the_weights_before_these_lose_bits() -> None:
    shared = [Plan(mode, "full", shards=2) for mode in ("none", "fp8", "nf4")]
    assert rungs(preset(), 24, 2) == [
        *(plan for mode, together in zip(("none", "fp8", "nf4"), shared)
          for plan in (Plan(mode), Plan(mode, "selective"), Plan(mode, "full"), together)), *NF4]
    assert rungs(preset(shard="on"), 24, 2) == shared == rungs(preset(shard="on", dora=True), 24, 2)
    assert rungs(preset(shard="off"), 24, 2) == rungs(preset(), 24) == rungs(preset(shard="on"), 24)
    assert all(plan.shards == 1 for plan in rungs(preset(offload_blocks=5), 24, 2))
    assert below(preset(offload_blocks=0), 24, shared[0], 2) == [Plan("fp8", "full"), shared[1], Plan("nf4", "full"),
                                                                 shared[2]]


@pytest.mark.parametrize(("plan", "shard", "gpus", "then"), [
    (Plan("fp8", "full", shards=2), "auto", 1, Plan("fp8", "full")), (Plan("nf4", "full", 8), "auto", 2,
                                                                    Plan("nf4", "full", 8)),
    (Plan("fp8", "full", shards=2), "auto", 4, Plan("fp8", "full", shards=4)),
    (Plan(), "on", 2, Plan("none", "full", shards=2)), (Plan(), "auto", 2, Plan())])
def test_a_run_that_goes_on_with_other_gpus_is_held_by_those(plan: Plan, shard: str, gpus: int, then: Plan) -> None:
    assert for_gpus(plan, preset(shard=shard).memory, gpus) == then


def test_a_small_model_has_fewer_rungs() -> None:
    assert [plan.offload_blocks for plan in rungs(preset(), 2)[9:]] == [1]
    assert rungs(preset(), 0)[-1] == rungs(preset(), 1)[-1] == Plan("nf4", "full")


@pytest.mark.parametrize("count", [24, 25, 500])
def test_more_blocks_than_can_be_offloaded_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"memory.offload_blocks = {count}: this model has 24 blocks, of which at most "
                                        "23 can"):
        rungs(preset(offload_blocks=count), 24)
    assert rungs(preset(offload_blocks=23), 24)[0].offload_blocks == 23


def test_without_a_budget_nothing_is_done_that_was_not_asked_for() -> None:
    assert plain(preset(), 24) == Plan()
    assert plain(preset(quantize="nf4", gradient_checkpointing="full"), 24) == Plan("nf4", "full")


def test_the_text_encoder_has_a_ladder_of_its_own() -> None:
    assert text_rungs(preset().memory) == ["none", "fp8", "nf4"]
    assert text_rungs(preset(quantize_text_encoder="int8", quantize="nf4").memory) == ["int8"]


def test_a_plan_is_told_in_words() -> None:
    assert Plan("nf4", "full", 8).in_words(24) == "NF4, checkpointing, 8 of 24 blocks in system memory"
    assert Plan("fp8", "full", shards=2).in_words(24) == "FP8, checkpointing, shared by 2 GPUs"
    assert Plan().in_words(24) == "unquantised, no checkpointing"
    assert SELECTIVE.in_words(24) == "unquantised, selective checkpointing"


def test_dora_keeps_its_weights_on_the_gpu() -> None:
    assert rungs(preset(dora=True), 24)[-1] == Plan("nf4", "full")


@pytest.mark.parametrize(("plan", "lower"), [
    (Plan(), [SELECTIVE, *(Plan("none", "full", count) for count in (0, 8, 16, 23)), Plan("fp8", "full"),
              Plan("nf4", "full"), *NF4]),
    (Plan("nf4"), [Plan("nf4", "selective"), Plan("nf4", "full"), *NF4]),
    (Plan("fp8", "full", 23), [Plan("nf4", "full"), *NF4]),
    (Plan("nf4", "full", 16), [Plan("nf4", "full", 23)]),
    (NF4[-1], []),
])
def test_a_run_that_has_begun_keeps_its_quantisation_as_long_as_it_can(plan: Plan, lower: list[Plan]) -> None:
    assert below(preset(), 24, plan) == lower


def test_a_run_never_leaves_what_the_preset_fixes() -> None:
    assert below(preset(quantize="none", offload_blocks=0), 24, Plan()) == [SELECTIVE, Plan(checkpointing="full")]
    assert below(preset(gradient_checkpointing="selective"), 24, SELECTIVE) == [
        Plan("fp8", "selective"), Plan("nf4", "selective")]
    assert below(preset(quantize="none", offload_blocks=0), 24, Plan(checkpointing="full")) == []
