"""Reads training curves from metrics.jsonl."""

from pathlib import Path
from typing import Any

from ...trainer.loop.metrics import read_row

Curves = dict[str, list[dict[str, Any]]]


def read_curves(path: Path) -> Curves:
    """Return the lines of each stage in step order; of two lines for one step, the later counts. {} without a file.

    Lines that hold no step (cut short by a kill, or damaged later) are skipped, since the curves are only drawn.
    """
    if not path.exists():
        return {}
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    # not splitlines(), which also breaks at characters that JSON text may contain
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        row = read_row(line)
        if row is not None:
            # a resumed run repeats the steps since its checkpoint; the later line is that of the weights that went on
            stages.setdefault(row["stage"], {})[row["step"]] = row
    return {stage: [rows[step] for step in sorted(rows)] for stage, rows in stages.items()}
