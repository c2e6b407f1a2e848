"""The speed that an earlier start of a run has logged."""

from math import isfinite
from pathlib import Path
from statistics import median

from ...trainer.loop.metrics import read_row

_FIRST = 2
"""Steps at the beginning of a stage that are left out: they compile, allocate and fill caches."""
_LAST = 200
"""Steps that count: the newest ones."""


def measured_speeds(out: Path) -> dict[str, float]:
    """Return stage -> median tokens per second over its newest steps, from ``metrics.jsonl`` of a run folder; {} if there is none.

    The speed is that of all processes, without evaluation and checkpoints.
    """
    found: dict[str, list[float]] = {}
    try:
        with (out / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
            # line by line: the file of a long run is large
            for line in lines:
                row = read_row(line)
                speed = row.get("tokens_per_second") if row else None
                if row is not None and row["step"] > _FIRST and isinstance(speed, int | float) and speed > 0 and isfinite(speed):
                    found.setdefault(row["stage"], []).append(float(speed))
    # no run folder yet, or none that can be read: then nothing was measured
    except OSError:
        return {}
    # the median, which single slow steps do not move
    return {stage: median(speeds[-_LAST:]) for stage, speeds in found.items()}
