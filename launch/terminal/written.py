"""Writes what another program may read: text as it comes, or JSON. A reader that has seen enough (`| head`) ends the verb in silence."""

import json
import os
import sys
from typing import Any, NoReturn

from ...models.common.files import finite
from ...models.common.terminal_text import printable
from .console import CleanConsole


class QuietEndConsole(CleanConsole):
    """A console for verbs that have nothing to lose when their output is no longer read."""

    def on_broken_pipe(self) -> None:
        """End in silence."""
        end_in_silence()


def write_out(text: str) -> None:
    """Write to stdout at once. A terminal gets no control characters, another program gets the text as it is."""
    try:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except BrokenPipeError:
        end_in_silence()


def write_json(content: Any) -> None:
    """Write indented JSON to stdout; NaN and infinities become null."""
    write_out(json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def end_in_silence() -> NoReturn:
    """End the process well: the reader of stdout has closed the pipe."""
    # otherwise Python reports an error when it flushes the stream at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)
