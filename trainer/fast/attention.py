"""Chooses the kernels of attention by timing them on a run's own shapes; a resume goes on with the same."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer import speed
from trainer.fast import passes
from trainer.faults import out_of_memory
from trainer.session import Session

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}
WORDS = {"flash": "FlashAttention", "cudnn": "cuDNN", "efficient": "memory-efficient attention"}
USUAL = "usual"  # what torch takes by itself
CUDNN_FROM = 9  # compute capability from which torch itself prefers cuDNN; where it does not, a fault could end the run
WORTH_STEPS = 200  # a step saves some milliseconds, and finding out takes about a second
GAIN = 0.97  # of the usual time: more saves nothing, and would differ from one measurement to the next

Times = dict[str, float | None]  # seconds by backend; None: it cannot


class Call(NamedTuple):
    """What attention is called with: sizes and strides of q, k and v (b h n d), and their dtype."""

    sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype


def choose(session: Session) -> None:
    """Let attention run by the fastest kernels from now on, where the run is long enough for that to be found out."""
    progress = session.progress
    if progress.step == 0:
        progress.attention = USUAL
        if worth_it(session):
            progress.attention = _measured(session)
    chosen = progress.attention
    if chosen not in (USUAL, *candidates(session.device)):  # of a run that began on another GPU, and may go back
        session.recorder.note(progress.step, f"Attention runs by PyTorch's own choice here: {WORDS[chosen]}, by which "
                                             "the run began, is not for this GPU")
    elif chosen != USUAL:
        session.attention = preferred(chosen)
        session.attention.__enter__()


def release(session: Session) -> None:
    """Let attention run as it did before `choose`."""
    if session.attention is not None:
        session.attention.__exit__(None, None, None)
        session.attention = None


def worth_it(session: Session) -> bool:
    """Whether a new run may gain; one that must repeat to the bit on another day does not choose by the clock."""
    return (session.device.type == "cuda" and not session.preset.train.deterministic
            and session.steps >= WORTH_STEPS)


def candidates(device: torch.device) -> list[str]:
    """The kernels to time."""
    newer = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= CUDNN_FROM
    return [name for name in BACKENDS if name != "cudnn" or newer]


def _measured(session: Session) -> str:
    """The first process's choice for all; the usual kernels where there is not memory enough to find out."""
    calls: Counter[Call] = Counter()
    watched = passes.unless_full(session, lambda: calls.update(recorded(lambda: passes.first_forward(session))))
    found = watched and passes.unless_full(session, lambda: _found(session, calls) if session.world.first else USUAL)
    return found[0] if found else USUAL


def _found(session: Session, calls: Counter[Call]) -> str:
    """The fastest kernels as remembered or as measured now, with a note where they are not the usual ones."""
    device = session.device
    names = candidates(device)
    workspace, key = session.cache.root.parent, signature(calls, names, speed.device_name(device))
    known = speed.recall_attention(workspace, key)
    if known in (USUAL, *names):
        chosen, told = known, "as measured in an earlier run"
    else:
        session.recorder.phase("measuring attention")
        times = {call: {name: seconds(call, name, device) for name in (USUAL, *names)} for call in calls}
        chosen, totals = fastest(times, calls)
        told = f"{1000 * totals[chosen]:.1f} ms a pass instead of {1000 * totals[USUAL]:.1f}"
        speed.remember_attention(workspace, key, chosen)
    if chosen != USUAL:
        session.recorder.note(0, f"Attention runs by the kernels of {WORDS[chosen]}, which are the fastest for this "
                              f"run's shapes on this GPU: {told}")
    return chosen


def recorded(work: Callable[[], None]) -> Counter[Call]:
    """How often attention is called in what way; calls with a mask have no choice, and are left out."""
    attention, calls = F.scaled_dot_product_attention, Counter()

    def watching(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any,  # noqa: ANN401
                 **options: Any) -> Tensor:  # noqa: ANN401
        if attn_mask is None:
            given = query, key, value
            calls[Call(tuple(tuple(x.shape) for x in given), tuple(x.stride() for x in given), query.dtype)] += 1
        return attention(query, key, value, attn_mask, *rest, **options)

    F.scaled_dot_product_attention = watching
    try:
        work()
    finally:
        F.scaled_dot_product_attention = attention
    return calls


def seconds(call: Call, name: str, device: torch.device) -> float | None:
    """Of a forward and a backward pass by one backend; None where it cannot."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own stays as it is
    made = [torch.empty_strided(size, stride, dtype=call.dtype, device=device).normal_(generator=generator)
            .requires_grad_() for size, stride in zip(call.sizes, call.strides)]

    def once() -> None:
        out = F.scaled_dot_product_attention(*made)
        torch.autograd.grad(out, made, torch.ones_like(out))

    try:
        with only(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says at length why a kernel cannot
            return passes.clocked(once, device)
    except RuntimeError as error:
        if out_of_memory(error):  # says nothing of the kernels, and would be remembered
            raise
        return None


def fastest(times: Mapping[Call, Times], calls: Counter[Call]) -> tuple[str, dict[str, float]]:
    """The backend to prefer, and the seconds of a pass's attention by each; calls that it cannot go the usual way.

    The usual one stays unless another is clearly faster.
    """
    totals = {name: sum(count * (times[call][name] or times[call][USUAL] or 0.0) for call, count in calls.items())
              for name in next(iter(times.values()), {USUAL: None})}
    best = min(totals, key=totals.__getitem__)
    return (best if totals[best] < GAIN * totals[USUAL] else USUAL), totals


def only(name: str) -> AbstractContextManager[Any]:
    """Attention by one backend alone; USUAL: as it is."""
    return nullcontext() if name == USUAL else sdpa_kernel(BACKENDS[name])


@contextmanager
def preferred(name: str) -> Iterator[None]:
    """Attention by one backend where it can, else by another that is on: first by those that torch has everywhere."""
    on = torch.backends.cuda
    others = [(SDPBackend.FLASH_ATTENTION, on.flash_sdp_enabled()),
              (SDPBackend.EFFICIENT_ATTENTION, on.mem_efficient_sdp_enabled()),
              (SDPBackend.CUDNN_ATTENTION, on.cudnn_sdp_enabled()), (SDPBackend.MATH, on.math_sdp_enabled())]
    with sdpa_kernel([BACKENDS[name], *(backend for backend, is_on in others if is_on)], set_priority=True):
        yield


def signature(calls: Counter[Call], names: Sequence[str], device: str) -> str:
    """What the fastest kernels depend on."""
    shapes = sorted(f"{count}x{'/'.join(map(str, call.sizes + call.strides))}{call.dtype}"
                    for call, count in calls.items())
    return " ".join(["attention", device, torch.__version__, *names, *shapes])
