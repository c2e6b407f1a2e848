"""Says which of the user's files a verb is about to run."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from ...models.common.terminal_text import printable

PLANNED = "DECOCT_PLANNED"
"""Environment variable that tells the started processes that the plan has been shown, and the imported files have been named."""


def tell_imported(path: Path) -> None:
    """Print a line on stderr before an imported file runs; once for all processes of a run."""
    # all ranks run the same files
    if os.environ.get("RANK", "0") == "0" and not os.environ.get(PLANNED):
        with suppress(OSError, ValueError):
            print(printable(f"decoct: runs the code of {path}, which the recipe imports"), file=sys.stderr, flush=True)
