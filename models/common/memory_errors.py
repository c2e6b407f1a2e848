"""Memory that ran out, told apart from other errors: every library has a way of its own to say so."""

import errno
import re
from typing import Literal

_SAYINGS = re.compile(
    r"can(?:'t|not) allocate memory|not enough memory|out of memory|std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED|unable to mmap",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"tr(?:ied|y) to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)


def out_of_memory(error: BaseException) -> Literal["the GPU", "this machine"] | None:
    """Whose memory ran out; None when ``error`` is something else."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names:  # torch's, which is not imported for this
        return "the GPU"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "this machine"
    if isinstance(error, RuntimeError) and _SAYINGS.search(text := str(error)):
        return "the GPU" if re.search("CUDA|CUBLAS|HIP", text) else "this machine"
    return None


def asked_for(error: BaseException) -> str:
    """``" (2.00 GiB were asked for at once)"``, or nothing where the error does not say."""
    found = _AMOUNT.search(str(error))
    return f" ({found[1]} were asked for at once)" if found else ""
