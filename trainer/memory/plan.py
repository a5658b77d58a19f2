"""The ladder from the fastest to the most sparing way to hold a model: what the budget of a run chooses from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.errors import UserError
from trainer.schema import Memory, Preset

WORDS = {"none": "unquantised", "fp8": "FP8", "int8": "INT8", "nf4": "NF4"}
CHECKPOINTING = {"none": "no checkpointing", "selective": "selective checkpointing", "full": "checkpointing"}
LEVELS = list(CHECKPOINTING)  # from the fastest to the most sparing
FULL = 0.95  # of the limit that a plan or graphs may take: the rest is for gaps between tensors
LADDER = 2  # of these rungs: what was found to fit on an older ladder may not be the fastest on this one


@dataclass(frozen=True)
class Plan:
    """How a run holds its model in memory."""

    quantize: str = "none"  # none, fp8, int8, nf4: the frozen weights
    checkpointing: str = "none"  # of LEVELS
    offload_blocks: int = 0  # blocks whose weights stay in the host's memory
    shards: int = 1  # GPUs of one computer that hold the blocks together, a part each

    def in_words(self, blocks: int) -> str:
        """For a person: "NF4, checkpointing, 8 of 24 blocks in system memory"."""
        parts = [WORDS[self.quantize], CHECKPOINTING[self.checkpointing]]
        if self.shards > 1:
            parts.append(f"shared by {self.shards} GPUs")
        if self.offload_blocks:
            parts.append(f"{self.offload_blocks} of {blocks} blocks in system memory")
        return ", ".join(parts)


def rungs(preset: Preset, blocks: int, gpus: int = 1) -> list[Plan]:
    """The plans that a preset leaves open for a model of so many blocks, from the fastest to the most sparing.

    gpus: that can hold the model together. The pictures come first: what changes only the time (checkpointing: hardly
    when it is selective, by about a third when it is full; and sharing the blocks between GPUs) goes before what
    changes the weights; with fewer bits there may be room again to checkpoint less. FP8 with a scale a row is close to
    16 bits; NF4 halves once more. INT8 holds as much as FP8 and is slower, so it is taken only when asked for.
    Offloading comes last, since it can cost many times the step, and over NF4, of which the least has to travel; DoRA
    reads all weights at each step, so it keeps them. What the preset fixes stays fixed. Raises `UserError` for more
    blocks than there are.
    """
    memory = preset.memory
    if memory.offload_blocks >= max(blocks, 1):
        raise UserError(f"memory.offload_blocks = {memory.offload_blocks}: this model has {blocks} blocks, of which at "
                        f"most {max(blocks - 1, 0)} can be kept in system memory; make it smaller, or -1 for as the "
                        "budget needs")
    gpus = gpus if blocks and memory.shard != "off" else 1
    counts = [gpus] if memory.shard == "on" else sorted({1, gpus})
    ladder = [*(Plan(mode, level, shards=count) for mode in ("none", "fp8", "nf4") for level in LEVELS
                for count in counts if level == "full" or count == 1),
              *(Plan("nf4", "full", count) for count in (blocks // 3, 2 * blocks // 3, blocks - 1)
                if count > 0 and not preset.adapter.dora)]
    return list(dict.fromkeys(_fixed(plan, memory) for plan in ladder
                              if _possible(plan, memory) and (plan.shards == gpus or memory.shard != "on")))


def plain(preset: Preset, blocks: int, gpus: int = 1) -> Plan:
    """The plan of a device without a budget, such as a CPU: what the preset asks for, and nothing else."""
    return rungs(preset, blocks, gpus)[0]


def for_gpus(plan: Plan, memory: Memory, gpus: int) -> Plan:
    """A run's plan when it goes on with another number of GPUs that can hold the model together."""
    if gpus > 1 and (plan.shards > 1 or memory.shard == "on"):
        return replace(plan, checkpointing="full", offload_blocks=0, shards=gpus)
    return replace(plan, shards=1)


def below(preset: Preset, blocks: int, plan: Plan, gpus: int = 1) -> list[Plan]:
    """More sparing plans than `plan`, for a run that has begun with it: first those that keep its quantisation, then
    those with fewer bits that checkpoint no less."""
    fixed = preset.memory.model_copy(update={"quantize": plan.quantize})
    same = rungs(preset.model_copy(update={"memory": fixed}), blocks, gpus)
    same = same[same.index(plan) + 1:] if plan in same else []
    ladder = rungs(preset, blocks, gpus)
    modes = list(dict.fromkeys(other.quantize for other in ladder))
    fewer_bits = modes[modes.index(plan.quantize) + 1:] if plan.quantize in modes else []
    level = max(LEVELS.index(other.checkpointing) for other in [plan, *same])
    return same + [other for other in ladder
                   if other.quantize in fewer_bits and LEVELS.index(other.checkpointing) >= level]


def text_rungs(memory: Memory) -> list[str]:
    """The same for the text encoder, which only encodes: how it may be quantised."""
    return ["none", "fp8", "nf4"] if memory.quantize_text_encoder == "auto" else [memory.quantize_text_encoder]


def _fixed(plan: Plan, memory: Memory) -> Plan:
    """The plan with what the preset says itself."""
    return Plan(plan.quantize if memory.quantize == "auto" else memory.quantize,
                plan.checkpointing if memory.gradient_checkpointing == "auto" else memory.gradient_checkpointing,
                plan.offload_blocks if memory.offload_blocks < 0 else memory.offload_blocks, plan.shards)


def _possible(plan: Plan, memory: Memory) -> bool:
    """A block that leaves the GPU must be run again in the backward pass, so offloading and sharing need
    all of it to be checkpointed; and it leaves for one place."""
    if plan.shards > 1 and (memory.gradient_checkpointing not in ("auto", "full") or memory.offload_blocks > 0):
        return False
    level = plan.checkpointing if memory.gradient_checkpointing == "auto" else memory.gradient_checkpointing
    offloads = plan.offload_blocks > 0 if memory.offload_blocks < 0 else memory.offload_blocks > 0
    return level == "full" or not offloads
