"""Training curves out of metrics.jsonl, the local truth."""

import json
from pathlib import Path
from typing import Any

Curves = dict[str, list[dict[str, Any]]]


def read_curves(path: Path) -> Curves:
    """Lines grouped by stage, in step order; of two lines for one step the later counts. No file: no curves.

    A last line cut short by a kill is left out; any other broken line is an error of ours and raises ``ValueError``.
    """
    if not path.exists():
        return {}
    lines = path.read_text().split("\n")
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) - 1:
                break
            raise
        stages.setdefault(row["stage"], {})[row["step"]] = row
    return {stage: [rows[step] for step in sorted(rows)] for stage, rows in stages.items()}
