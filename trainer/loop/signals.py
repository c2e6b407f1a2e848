"""Ctrl-C and SIGTERM as flags: the step in progress ends, a checkpoint is written, then the process leaves.

Lightning's own handler runs a collective inside the signal handler, which hangs a job when one rank alone gets the signal. Here
the flags travel with the sums of the next step, so all ranks stop after the same one.
"""

import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Flags set by signals while installed; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the handlers over; only possible, and only done, in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOPPING}

    def uninstall(self) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def counts(self) -> list[float]:
        """One number per signal, to be summed over ranks."""
        return [float(number in self._received) for number in STOPPING]

    @staticmethod
    def agreed(counts: list[float]) -> int | None:
        """The signal to obey, given the summed counts."""
        return next((int(number) for number, count in zip(STOPPING, counts) if count > 0), None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        self._received.add(number)
