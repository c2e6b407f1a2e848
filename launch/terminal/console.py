"""The console for all output. It keeps text from files, servers and names from controlling the terminal."""

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
    """rich's console, except that it removes control characters from text and ends the program with a message when the pipe is closed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Clean segments of text; rich's own segments that move the cursor stay as they are."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text is segment.text or text == segment.text else Segment(text, segment.style)

    def on_broken_pipe(self) -> None:
        """End with a message on stderr instead of silently."""
        self.quiet = True
        # otherwise Python reports an error when it flushes the stream at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputClosedError(
            "the output is no longer read (the pipe was closed); run the same command again to resume from the last checkpoint"
        )
