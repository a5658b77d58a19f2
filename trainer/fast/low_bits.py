"""Decides whether a run's frozen layers multiply in 8 bits: by what its own batches show, once; a resume goes on so."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.control import Stopped
from trainer.distributed import Elsewhere
from trainer.errors import UserError
from trainer.fast import compile as block_compiler
from trainer.fast import matmul, passes
from trainer.fast.matmul import LowBits
from trainer.gpu import free_memory
from trainer.memory.hold import reload
from trainer.memory.plan import WORDS
from trainer.schema import FLOW_FAMILIES
from trainer.session import Session

LIKE = 0.999  # the least median cosine of the adapter's gradients, with and without, to multiply so unasked
FASTER = 0.95  # of the time of a step's passes: what they must take to multiply so unasked
SIDE, ROWS, WORK = 1024, 512, 2**32  # of a layer that gains: sides of W, rows of its input, and all three multiplied
# Compute capability that tensor cores multiply so from, Ampere and Ada. Integers first: as fast, and more exact.
FIRST = {"int8": (8, 0), "fp8": (8, 9)}
STEPS = 2  # whose gradients are compared
LONG = 400  # steps that a run must have left to be measured at all
SAVES = 0.15  # of a step's time, where it works
COST, PAYS = 30.0, 3.0  # seconds that finding out takes, and times that they must be saved to try it unasked
NOT_OURS = (Stopped, UserError, Elsewhere)  # what ends passes and is no fault of products; Triton has errors of its own


class Found(NamedTuple):
    """Products that give the right gradients, and how right they are, in words."""

    low: LowBits
    words: str


def begin(session: Session) -> Found | None:
    """Before blocks are compiled: let layers multiply as the preset or the checkpoint says.

    Returns what `settle` is to decide after that: what was not asked for, gives the right gradients, and may be faster.
    """
    asked, progress = session.preset.train.matmul, session.progress
    before = progress.matmul if progress.step else "auto"
    wanted = before if asked == "auto" else asked
    progress.matmul = "off"
    if wanted == "off" or (wanted == "auto" and not may_pay(session)):
        return None
    able, why_not = choices(session, list(FIRST) if wanted == "auto" else [wanted])
    if not able:
        if wanted != "auto":
            _refuse(session, f"{why_not}; they did until here" if wanted == before else why_not)
        return None
    if wanted == before != "auto":
        use(session, able[0])
        _tell(session, f"Frozen layers multiply in {WORDS[wanted]}, as they did before")
        return None
    return compare(session, able, asked=wanted != "auto")


def settle(session: Session, found: Found) -> None:
    """After blocks are compiled, if they are: keep products in 8 bits where they are faster."""
    compiled = any(isinstance(block, block_compiler.CompiledBlock)
                   for block in block_compiler.blocks_of(session.denoiser))
    try:
        before = max(session.world.together(lambda: passes.seconds(session)))
        session.world.together(lambda: use(session, found.low))
        after = max(session.world.together(lambda: passes.seconds(session)))
        times = f"a step's passes take {after:.3f} s instead of {before:.3f} s"
        if after <= FASTER * before:
            _tell(session, f"{found.words}, and {times}")
            return
        why_not = f"{found.words}, but that is not faster: {times}"
    except NOT_OURS:
        raise
    except Exception as error:
        why_not = _reason(error)
    session.low_bits, session.progress.matmul = None, "off"
    reload(session)
    if compiled:
        block_compiler.install(session.denoiser)
    _refuse(session, why_not)


def may_pay(session: Session) -> bool:
    """Whether it could be worth its time unasked: transformers have the large products. Where every bit counts, no two
    runs may decide differently."""
    preset, left = session.preset, session.steps - session.progress.step
    able = preset.model.family in FLOW_FAMILIES and session.device.type == "cuda" and not preset.train.deterministic
    if not able or left < LONG:
        return False
    return left * SAVES * max(session.world.together(lambda: passes.seconds(session))) >= PAYS * COST


def choices(session: Session, kinds: Sequence[str]) -> tuple[list[LowBits], str]:
    """How the run's layers can multiply, of the kinds asked for; and what keeps the others from it."""
    able, why_not = [], []
    for kind in kinds:
        said = session.world.together(lambda kind=kind: obstacle(session, kind))
        if reason := next(filter(None, said), None):
            why_not.append(reason)
        elif paths := large_layers(session, kind):
            able.append(LowBits(kind, paths))
        else:
            why_not.append("no layer of this model is large enough to gain by it")
    return able, "; ".join(dict.fromkeys(why_not))


def obstacle(session: Session, kind: str) -> str | None:
    """Why this run's layers cannot multiply so, in words; None where nothing speaks against it."""
    if session.device.type != "cuda":
        return f"that needs an NVIDIA GPU, and this run trains on {session.device.type}"
    if torch.cuda.get_device_capability(session.device) < FIRST[kind]:
        return f"this GPU ({torch.cuda.get_device_name(session.device)}) cannot multiply in {WORDS[kind]}"
    if session.offload is not None:
        return f"blocks of the model are fetched from {session.offload.SOURCE} at each step"
    if session.plan.quantize not in ("none", kind):
        return f"the model is held in {WORDS[session.plan.quantize]}"
    return block_compiler.compiler_missing() or matmul.fault(kind, session.device, session.dtype)


def large_layers(session: Session, kind: str) -> frozenset[str]:
    """Paths of the linears whose products are so large that 8 bits save more than making the codes takes."""
    able = matmul.able_linears(session.denoiser, kind)
    rows = passes.rows_of_inputs(session, frozenset(able))
    return frozenset(path for path, layer in able.items() if is_large(
        layer.in_features, layer.out_features, rows.get(path, 0)))


def is_large(columns: int, heights: int, rows: int) -> bool:
    """Whether a product gains, by the sides of W and the rows of the input."""
    return min(columns, heights) >= SIDE and rows >= ROWS and columns * heights * rows >= WORK


def use(session: Session, low: LowBits) -> None:
    """Let the session's model multiply so, and remember it."""
    matmul.install(session.denoiser, low)
    session.low_bits, session.progress.matmul = low, low.kind
    free_memory()


def compare(session: Session, able: Sequence[LowBits], asked: bool) -> Found | None:
    """Compare the gradients of coming steps: use what was asked for, or return the first choice that is right."""
    seen: list[str] = []
    try:
        expected: list[list[Tensor]] = []
        session.world.together(lambda: expected.extend(passes.gradients(session, STEPS)))
        for low in able:
            cosine = min(session.world.together(lambda low=low: _cosine(session, low, expected)))
            seen.append(f"{WORDS[low.kind]} {cosine:.5f}")
            words = (f"{len(low.paths)} frozen layers multiply in {WORDS[low.kind]}. The adapter's gradients have a "
                     f"median cosine of {cosine:.5f} with those without it")
            if not asked and cosine >= LIKE:
                return Found(low, words)
        why_not = f"the adapter's gradients need a median cosine of {LIKE} with those without it: {', '.join(seen)}"
    except NOT_OURS:
        raise
    except Exception as error:
        asked, why_not = False, _reason(error)
    if asked:
        use(session, low)
        _tell(session, words + ("" if cosine >= LIKE else f"; 'auto' asks for {LIKE} at least"))
    else:
        _refuse(session, why_not)
    return None


def likeness(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """The median cosine between gradients, over steps, tensors and their layers; where one is zero there is none."""
    cosines = []
    for step, other in zip(found, expected):
        for one, two in zip(step, other):
            one, two = one.flatten(1).float(), two.flatten(1).float()
            cosines.append(torch.cosine_similarity(one, two, dim=1)[two.norm(dim=1) > 0])
    return torch.cat(cosines).nan_to_num(-1.0).median().item()


def _cosine(session: Session, low: LowBits, expected: Sequence[Sequence[Tensor]]) -> float:
    matmul.try_out(session.denoiser, low)
    try:
        return likeness(passes.gradients(session, STEPS), expected)
    finally:
        matmul.stop_trying(session.denoiser, low)


def _reason(error: Exception) -> str:
    traceback.print_exc()  # to the run's log
    return f"that failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"


def _refuse(session: Session, why_not: str) -> None:
    _tell(session, f"Frozen layers do not multiply in 8 bits: {why_not}")


def _tell(session: Session, text: str) -> None:
    session.recorder.note(session.progress.step, text)
