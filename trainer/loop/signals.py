"""Turns Ctrl-C and SIGTERM into flags: the current step ends, a checkpoint is written, then the process exits.

Lightning's own handler runs a collective operation inside the signal handler, which hangs a job if only one rank gets the signal. Here the
flags are summed over ranks with the sums of the next step, so all ranks stop after the same step.
"""

import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Flags that signals set while installed; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Installs the handlers. Python allows it only in the main thread; in others the former handlers stay."""
        if threading.current_thread() is threading.main_thread():
            # over Lightning's own handlers, which it has installed by now, see above
            self._previous = {number: signal.signal(number, self._note) for number in STOPPING}

    def uninstall(self) -> None:
        """Restores the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def counts(self) -> list[float]:
        """One number per signal, for a sum over ranks."""
        return [float(number in self._received) for number in STOPPING]

    @staticmethod
    def agreed(counts: list[float]) -> int | None:
        """The signal to obey, given the summed counts."""
        # SIGTERM before SIGINT where ranks got different ones: every rank must end with the same exit code
        return next((int(number) for number, count in zip(STOPPING, counts) if count > 0), None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # a user who presses twice does not want to wait for the step. SIGTERM may repeat: schedulers and torchrun both send it
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        # nothing more: a handler may interrupt any line, also the middle of a collective
        self._received.add(number)
