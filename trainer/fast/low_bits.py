"""Decides whether a run's frozen layers multiply in 8 bits: by what its own batches show, once; a resume goes on so."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from trainer.control import Stopped
from trainer.distributed import Elsewhere
from trainer.errors import UserError, first_line
from trainer.fast import compile as block_compiler
from trainer.fast import matmul, passes
from trainer.fast.matmul import LowBits
from trainer.gpu import free_memory
from trainer.memory.plan import WORDS
from trainer.schema import FLOW_FAMILIES
from trainer.session import Session

LIKE = 0.999  # the least median cosine of the adapter's gradients, with and without, to multiply so unasked
FASTER = 0.9  # of the time that these products take: what they must take in 8 bits to multiply so unasked
SIDE, ROWS, WORK = 1024, 512, 2**32  # of a layer that gains: sides of W, rows of its input, and all three multiplied
# Compute capability that tensor cores multiply so from, Ampere and Ada. Integers first: as fast, and more exact.
FIRST = {"int8": (8, 0), "fp8": (8, 9)}
STEPS = 2  # whose gradients are compared
LONG = 400  # steps that a run must have left to be measured at all
SAVES = 0.15  # of a step's time, where it works
COST, PAYS = 10.0, 3.0  # seconds that finding out takes, and times that they must be saved to try it unasked
UNUSED = "Frozen layers do not multiply in 8 bits"
NOT_OURS = (Stopped, UserError, Elsewhere)  # what ends passes and is no fault of products; Triton has errors of its own


def choose(session: Session) -> str | None:
    """Before blocks are compiled: let layers multiply as the preset or the checkpoint says, or unasked as is right and
    faster. Returns what keeps the run from it that was asked for or might pay, in words."""
    asked, progress = session.preset.train.matmul, session.progress
    before = progress.matmul if progress.step else "auto"
    wanted = before if asked == "auto" else asked
    progress.matmul = "off"
    if wanted == "off" or (wanted == "auto" and not may_pay(session)):
        return None
    kinds = list(FIRST) if wanted == "auto" else [wanted]
    found = passes.unless_full(session, lambda: choices(session, kinds))
    able, why_not = found[0] if found else ([], "there was not memory enough to find out whether they can")
    if not able:
        return f"{why_not}; they did until here" if wanted == before != "auto" else why_not
    if wanted == before != "auto":
        use(session, able[0])
        _tell(session, f"Frozen layers multiply in {WORDS[wanted]}, as they did before")
    else:
        compare(session, able, asked=wanted != "auto")
    return None


def may_pay(session: Session) -> bool:
    """Whether it could be worth its time unasked: transformers have the large products. Where every bit counts, no two
    runs may decide differently."""
    preset, left = session.preset, session.steps - session.progress.step
    able = preset.model.family in FLOW_FAMILIES and session.device.type == "cuda" and not preset.train.deterministic
    if not able or left < LONG:
        return False
    seconds = passes.unless_full(session, lambda: passes.seconds(session))
    return seconds is not None and left * SAVES * max(seconds) >= PAYS * COST


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


def compare(session: Session, able: Sequence[LowBits], asked: bool) -> None:
    """Compare the gradients of coming steps: use what was asked for, or the first choice that is right and faster."""
    against: list[str] = []
    try:
        expected: list[list[Tensor]] = []
        session.world.together(lambda: expected.extend(passes.gradients(session, STEPS)))
        for low in able:
            cosine = min(session.world.together(lambda low=low: _cosine(session, low, expected)))
            told = (f"{len(low.paths)} frozen layers multiply in {WORDS[low.kind]}. The adapter's gradients have a "
                    f"median cosine of {cosine:.5f} with those without it")
            if asked:
                told = told if cosine >= LIKE else f"{told}; 'auto' asks for {LIKE} at least"
                break
            if cosine < LIKE:
                against.append(f"with {WORDS[low.kind]} the adapter's gradients have a median cosine of {cosine:.5f} "
                               f"with those without it, and {LIKE} is the least")
                continue
            faster, times = is_faster(session, low)
            if faster:
                told = f"{told}, and {times}"
                break
            against.append(f"{WORDS[low.kind]} would not be faster: {times}")
        else:
            _refuse(session, "; ".join(against))
            return
    except NOT_OURS:
        raise
    except Exception as error:
        _refuse(session, _reason(error))
        return
    use(session, low)
    _tell(session, told)


def is_faster(session: Session, low: LowBits) -> tuple[bool, str]:
    """Whether a pass's products take clearly less time so, and both times in words."""
    both = session.world.together(lambda: product_seconds(session, low))
    before, after = (max(times) for times in zip(*both))
    return after <= FASTER * before, f"their products take {after:.3f} s of a step instead of {before:.3f} s"


def product_seconds(session: Session, low: LowBits) -> list[float]:
    """What one pass's products take in layers as they are, and in 8 bits: forward, and for the gradient of the input.
    Each shape is timed once."""
    rows = passes.rows_of_inputs(session, low.paths)
    layers = {path: session.denoiser.get_submodule(path) for path in sorted(low.paths)}
    shapes = {path: (layer.in_features, layer.out_features, rows[path]) for path, layer in layers.items()}
    counts, totals = Counter(shapes.values()), [0.0, 0.0]
    make = partial(torch.randn, dtype=session.dtype, device=session.device,
                   generator=torch.Generator(session.device).manual_seed(0))  # the run's own stays as it is
    for (n, m, tall), path in {shape: path for path, shape in shapes.items()}.items():
        x, grad = make(tall, n), make(tall, m)
        for way, (product, gradient) in enumerate(matmul.both_ways(layers[path], low.kind)):
            once = sum(passes.clocked(work, session.device) for work in (partial(product, x), partial(gradient, grad)))
            totals[way] += counts[n, m, tall] * once
    return totals


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
    return f"that failed: {first_line(error)}"


def _refuse(session: Session, why_not: str) -> None:
    _tell(session, f"{UNUSED}: {why_not}")


def _tell(session: Session, text: str) -> None:
    session.recorder.note(session.progress.step, text)
