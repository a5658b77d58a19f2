"""Says what ended a run in a user's words, and what the user can do about it."""

from __future__ import annotations

import errno

import torch

from trainer.errors import NO_ROOM, UserError

NO_MEMORY = ("CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED",
             "CUDA out of memory")  # how libraries put it that allocate for themselves
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Diverged(UserError):
    """The loss stopped being a number: what is in memory is no better than the last checkpoint."""


def describe(error: BaseException) -> str:
    """An error in a sentence."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(as_user_error(error) or f"{type(error).__name__}: {error}")


def out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory ran out, whoever says so."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


def as_user_error(error: BaseException) -> UserError | None:
    """What a user can mend, in a user's words: memory or disk that ran out; None for a fault of the program."""
    if isinstance(error, UserError):
        return error
    if out_of_memory(error):
        return UserError("the GPU ran out of memory: make train.batch_size or data.resolution smaller, "
                         "or set memory.gradient_checkpointing = 'selective' or, for less still, 'full'")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return UserError("the memory of this machine ran out: make train.batch_size or data.resolution smaller, "
                         "or close other programs")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return UserError(f"{error.filename or 'a file'} cannot be written: {error.strerror}. Make room on that disk, "
                         "then resume the run")
    if isinstance(error, OSError) and error.errno in REFUSED:
        return UserError(f"{error.filename or 'a file'} cannot be used: {error.strerror}. Give this user the right "
                         "to it, or choose another --workspace")
    return None


def diverged(step: int, last_good: int, dtype: torch.dtype, steps_in_row: int) -> Diverged:
    """The fault of several steps without a finite loss, with what it most likely means."""
    causes = ["train.lr is too high"]
    if dtype == torch.float16:
        causes.append("fp16 overflows with this base: try train.precision = 'bf16' or 'fp32'")
    return Diverged(f"{steps_in_row} steps in a row had no finite loss, up to step {step}. Likely: "
                    f"{'; or '.join(causes)}. The last good checkpoint is step {last_good}")
