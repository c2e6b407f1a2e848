"""The console for all output; text from files, servers or names cannot control the terminal."""

import os
import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ...models.common.errors import DecoctError
from ...models.common.terminal_text import printable


class OutputClosedError(DecoctError):
    """The reader of the output has closed the pipe (`decoct ... | head`)."""

    exit_code = 1


class CleanConsole(Console):
    """rich's console, but text keeps no control characters, and a closed pipe ends the program with a message."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of text are cleaned; those with which rich itself moves the cursor stay as they are."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text is segment.text or text == segment.text else Segment(text, segment.style)

    def on_broken_pipe(self) -> None:
        """End with a message on the other stream instead of in silence."""
        self.quiet = True
        # otherwise Python reports an error when it flushes the stream at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputClosedError(
            "what is printed is no longer read (the pipe was closed); the same command goes on from the last checkpoint"
        )
