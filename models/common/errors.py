"""The errors that decoct raises deliberately, each with the exit code of the command line.

A user's mistake is a ``UserError``: one readable message (what was given, what is allowed, what to do), exit code 2,
no traceback. ``losses`` and ``qat.fake_quant`` raise plain ``ValueError``, because they do not import this package.
"""


class DecoctError(Exception):
    """Base of all deliberate errors; ``exit_code`` is the exit code of the process."""

    exit_code: int = 1


class UserError(DecoctError, ValueError):
    """A mistake that the user can correct: a recipe key, a file, a shape. The message names it and the remedy."""

    exit_code = 2


class NonFiniteError(DecoctError):
    """A loss or gradient is NaN or infinite. Raised before the optimizer step; the last checkpoint is kept."""

    exit_code = 1


class MemoryFullError(DecoctError):
    """The memory of a device or of this machine is full. The message names what to lower; the last checkpoint is kept."""

    exit_code = 1


class GateFailed(DecoctError):  # noqa: N818 - a gate that fails is not a mistake
    """A quality gate of an ``evaluate`` stage was not met; all results are kept."""

    exit_code = 3
