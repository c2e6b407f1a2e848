"""How the last start of a run ended, if it did not finish: ``outcome.json`` in the run folder, for `decoct runs`.

A run that is killed writes nothing; one that goes on again removes what an earlier start wrote.
"""

import json
import time
from contextlib import suppress
from pathlib import Path

from ...models.common.errors import GateFailed
from ...models.common.files import write_json_atomic

NAME = "outcome.json"
_LONGEST = 500


def note_outcome(run_dir: Path, error: BaseException) -> None:
    """Write that a start failed, or was interrupted. A gate that is not met is part of the report, and no failure."""
    # what went wrong matters more than this note of it; a folder that was discarded stays away
    if isinstance(error, GateFailed) or not run_dir.is_dir():
        return
    state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    said = (str(error).strip() or type(error).__name__)[:_LONGEST]
    with suppress(Exception):
        write_json_atomic(run_dir / NAME, {"state": state, "message": said, "at": time.strftime("%Y-%m-%d %H:%M:%S")})


def forget_run_outcome(run_dir: Path) -> None:
    """Remove what an earlier start wrote."""
    (run_dir / NAME).unlink(missing_ok=True)


def read_run_outcome(run_dir: Path) -> tuple[str, str] | None:
    """(failed or interrupted, the message); None if the last start wrote nothing."""
    try:
        found = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        return str(found["state"]), str(found["message"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
