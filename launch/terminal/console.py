"""The console that everything speaks through: nothing that a file, a server or a name holds can steer the terminal."""

import os
import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ...models.common.errors import DecoctError
from ...models.common.terminal_text import printable


class OutputClosedError(DecoctError):
    """Nobody reads what is printed any more (`decoct ... | head`)."""

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
        # or Python complains when it flushes the stream at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputClosedError(
            "what is printed is no longer read (the pipe was closed); the same command goes on from the last checkpoint"
        )
