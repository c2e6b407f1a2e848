"""The boundary for errors: an expected error becomes one message and an exit code; everything else is reported as a bug.

Exit code 2: the user can fix it, and another start would fail in the same way. Exit code 1: it failed while running, and another start may
succeed.
"""

import errno
import os
import re
import traceback
from dataclasses import dataclass

from ...models.common.errors import DecoctError
from ...models.common.files import disk_reason
from ...models.common.memory_errors import asked_for, out_of_memory
from ...models.tokenizer.tokenizer_checks import is_panic
from ...parts import MARK, PartError

_GOES_ON = "Run the same command again to resume from the last checkpoint."
# Errors of a disk or network that may be gone at the next start.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY)
_PEERS = re.compile(r"gloo|NCCL|ProcessGroup|c10d|Connection (closed|reset) by peer", re.IGNORECASE)


@dataclass(frozen=True)
class Ending:
    """Exit code and message of a process."""

    code: int
    message: str
    by_all: bool = False
    """Whether each rank reports the error itself, because rank 0 may not have it."""


def ending_of(error: BaseException) -> Ending | None:
    """Return the exit code and message of an expected error; None for an unexpected one."""
    # the order matters: our own errors first, then kinds that are subclasses or carriers of others, the vaguest last
    if isinstance(error, DecoctError):
        return Ending(error.exit_code, str(error))
    if isinstance(error, PartError):
        return Ending(2, str(error), by_all=True)
    # a panic of the tokenizer's Rust code is a BaseException of its own, and no Exception
    if is_panic(error):
        return Ending(2, f"the tokenizer cannot split a text of the data ({str(error).strip():.200}); use another tokenizer", by_all=True)
    if whose := out_of_memory(error):
        return Ending(
            1,
            f"{whose} is out of memory{asked_for(error)}. Lower trainer.micro_batch or data.seq_length, load the teacher smaller "
            f"(teacher.load_in: nf4, teacher.placement: offloaded), or end other programs; `decoct plan` shows what is needed. {_GOES_ON}",
            by_all=True,
        )
    if (own := own_place(error)) is not None:
        text = f"{type(error).__name__}: {error}" if str(error).strip() else type(error).__name__
        return Ending(2, f"{own}: {text}; this is code that the recipe imports (--debug shows the traceback)", by_all=True)
    if isinstance(error, UnicodeError) and _has_bytes(error):
        return Ending(2, "a file or folder has a name that is not UTF-8 and cannot be written into the run folder; rename it")
    if isinstance(error, OSError):
        return _of_system(error)
    # Python has no class of its own for it
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return Ending(1, f"no further thread can be started; raise the limit (ulimit -u), or end other programs. {_GOES_ON}", by_all=True)
    # libraries such as safetensors wrap a full disk in an error of their own, which is no OSError
    if (reason := disk_reason(error)) is not None:
        return Ending(2, f"{reason[0]}; {reason[1]}. {_GOES_ON}", by_all=True)
    if _is_peers(error):
        return Ending(1, f"another process of this run has ended or cannot be reached; its own output says why. {_GOES_ON}", by_all=True)
    return None


def own_place(error: BaseException) -> str | None:
    """Return file and line of the user's code that the error comes from, if a recipe has imported it; None if it has not."""
    place, step = None, error.__traceback__
    while step is not None:
        if (file := step.tb_frame.f_globals.get(MARK)) is not None:
            # the last one that is found is the innermost: the line that the user has to look at
            place = f"{file}:{step.tb_lineno}"
        step = step.tb_next
    return place


def _has_bytes(error: UnicodeError) -> bool:
    # lone surrogates stand for bytes that are not UTF-8 (PEP 383)
    return isinstance(error, UnicodeEncodeError) and any("\udc80" <= letter <= "\udcff" for letter in error.object)


def _of_system(error: OSError) -> Ending:
    """Return the ending of an error of disks, paths, permissions or networks."""
    what = error.strerror or str(error) or type(error).__name__
    # no number at all is what network libraries raise
    passing = error.errno in _PASSING or error.errno is None or isinstance(error, ConnectionError | TimeoutError)
    reason = disk_reason(error)
    if error.filename is not None:
        # a path as text or bytes, or the number of an open file
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes | str | os.PathLike) else str(error.filename)
        told = f"{reason[0]}; {reason[1]}" if reason else f"{what}; give another path"
        return Ending(1 if passing else 2, f"{name}: {told} (--debug shows where it was used)", by_all=True)
    if isinstance(error, ConnectionError | TimeoutError) or error.errno is None:
        return Ending(1, f"a connection or device failed: {what}. {_GOES_ON} (--debug shows where)", by_all=True)
    told = f"{reason[0]}; {reason[1]}" if reason else what
    # a known reason, such as a full disk, is for the user to remove; without one another start may work
    return Ending(1 if passing or not reason else 2, f"{told}. {_GOES_ON} (--debug shows where)", by_all=True)


def _is_peers(error: BaseException) -> bool:
    """Return whether the error only shows that another rank has ended."""
    if any(kind.__name__.startswith(("Dist", "Rendezvous")) for kind in type(error).__mro__):
        return True
    # gloo raises a bare RuntimeError for a lost peer; its text is all there is to go by
    return isinstance(error, RuntimeError) and "WORLD_SIZE" in os.environ and _PEERS.search(str(error)) is not None


def bug_report(error: BaseException) -> str:
    """Return the traceback of an unexpected error with instructions for a report."""
    from decoct import __version__

    lines = "".join(traceback.format_exception(error))
    return (
        f"{lines}decoct: this is a bug in decoct {__version__}: {type(error).__name__}. Please report it with the lines above. Finished "
        f"stages are intact in the run folder. {_GOES_ON}"
    )
