"""What ended a run, in a user's words."""

from __future__ import annotations

import errno

import pytest
import torch

from trainer.errors import UserError
from trainer.faults import as_user_error, describe, diverged, out_of_memory


@pytest.mark.parametrize("error, message", [
    (UserError("as it is"), "as it is"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU ran out of memory: make"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory of this machine ran out: make"),
    (OSError(errno.ENOSPC, "No space left", "/disk/x"), "/disk/x cannot be written: No space left. Make room"),
    (OSError(errno.ENOSPC, "No space left on device"), "a file cannot be written: No space left on device. Make room"),
    (OSError(errno.EROFS, "Read-only file system", "/disk/x"), "/disk/x cannot be used: Read-only file system."),
], ids=["told already", "memory of the GPU", "memory", "disk", "disk without a name", "rights"])
def test_what_a_user_can_mend_says_what_and_how(error, message) -> None:
    assert str(as_user_error(error)).startswith(message)
    assert describe(error) == str(as_user_error(error))


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False), (MemoryError(), False),
    (ValueError("CUDA error: out of memory"), False)])
def test_the_gpus_memory_may_run_out_in_several_words(error, expected) -> None:
    assert out_of_memory(error) == expected


@pytest.mark.parametrize("error, said", [
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    (FileNotFoundError(errno.ENOENT, "No such file"), "FileNotFoundError: [Errno 2] No such file"),
    (KeyboardInterrupt(), "interrupted"),
])
def test_anything_else_is_a_fault_of_the_program(error, said) -> None:
    assert as_user_error(error) is None and describe(error) == said


def test_a_loss_that_is_no_number_names_the_likely_cause_and_where_to_go_back_to() -> None:
    assert str(diverged(7, 4, torch.float32, 3)) == (
        "3 steps in a row had no finite loss, up to step 7. Likely: train.lr is too high. "
        "The last good checkpoint is step 4")
    assert "fp16 overflows with this base" in str(diverged(7, 4, torch.float16, 3))
