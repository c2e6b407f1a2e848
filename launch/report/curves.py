"""Training curves from metrics.jsonl, their local source."""

from pathlib import Path
from typing import Any

from ...trainer.loop.metrics import read_row

Curves = dict[str, list[dict[str, Any]]]


def read_curves(path: Path) -> Curves:
    """Lines grouped by stage, in step order; of two lines for one step the later counts. No file: no curves.

    Lines that tell of no step (cut short by a kill, damaged later) are left out: nothing but pictures is made of them.
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
