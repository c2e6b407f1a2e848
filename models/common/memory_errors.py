"""Recognizes errors of exhausted memory, which every library reports differently."""

import errno
import re
from typing import Literal

# phrases of torch, CUDA libraries and the C++ runtime
_SAYINGS = re.compile(
    r"can(?:'t|not) allocate memory|not enough memory|out of memory|std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED|unable to mmap",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"tr(?:ied|y) to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)


def out_of_memory(error: BaseException) -> Literal["the GPU", "this machine"] | None:
    """The device whose memory is exhausted; None for other errors."""
    names = {kind.__name__ for kind in type(error).__mro__}
    # torch.OutOfMemoryError by name, so that torch need not be imported
    if "OutOfMemoryError" in names:
        return "the GPU"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "this machine"
    if isinstance(error, RuntimeError) and _SAYINGS.search(text := str(error)):
        return "the GPU" if re.search("CUDA|CUBLAS|HIP", text) else "this machine"
    return None


def asked_for(error: BaseException) -> str:
    """``" (it requested 2.00 GiB at once)"``, or '' if the error does not state an amount."""
    found = _AMOUNT.search(str(error))
    return f" (it requested {found[1]} at once)" if found else ""
