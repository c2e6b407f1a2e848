"""Memory that ran out is known by whatever name a library gives it."""

import errno

import numpy as np
import pytest
import torch

from decoct.models.common.memory_errors import asked_for, out_of_memory


def test_what_this_machine_really_raises() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value) == "this machine"
    assert asked_for(caught.value) == f" (it requested {2**60} bytes at once)"
    with pytest.raises(MemoryError) as numpys:
        np.empty(2**60, np.uint8)
    assert out_of_memory(numpys.value) == "this machine"


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (MemoryError(), "this machine"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"), "the GPU"),
        (RuntimeError("CUDA error: out of memory"), "the GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU"),
        (RuntimeError("std::bad_alloc"), "this machine"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine"),
        (RuntimeError("shape mismatch"), None),
        (ValueError("out of memory"), None),
        (OSError(errno.EIO, "Input/output error"), None),
    ],
)
def test_whose_memory_ran_out(error: Exception, whose: str | None) -> None:
    assert out_of_memory(error) == whose


def test_the_amount_is_told_where_it_is_known() -> None:
    assert asked_for(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")) == " (it requested 2.00 GiB at once)"
    assert asked_for(MemoryError()) == ""
