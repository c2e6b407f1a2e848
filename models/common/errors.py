"""The errors decoct raises on purpose, each with the exit code of the command line.

A user's mistake is a ``UserError``: one readable message (what was given, what is allowed, what to do), exit code 2,
no traceback. ``losses`` and ``qat.fake_quant`` raise plain ``ValueError``: they know nothing of this package.
"""


class DecoctError(Exception):
    """Base of all deliberate failures; ``exit_code`` is what the process ends with."""

    exit_code: int = 1


class UserError(DecoctError, ValueError):
    """Something the user can mend: a recipe key, a file, a shape. The message names it and the remedy."""

    exit_code = 2


class NonFiniteError(DecoctError):
    """A loss or gradient became NaN or infinite; raised before the optimizer step, the last checkpoint is kept."""

    exit_code = 1


class MemoryFullError(DecoctError):
    """The memory of a device or of this machine is full; the message names what to lower, the last checkpoint is kept."""

    exit_code = 1


class GateFailed(DecoctError):  # noqa: N818 - a gate that fails is no error of anyone
    """A quality gate of an ``evaluate`` stage was not met; everything that was made is kept."""

    exit_code = 3
