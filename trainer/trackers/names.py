"""How trackers call the numbers of ``metrics.jsonl``: in groups, on axes that go on from stage to stage.

A tracker shows one run with one line per figure, so steps and tokens of the stages before are added. The lines of ``metrics.jsonl`` keep
the names and the steps of their stage.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

TOKENS = "tokens"
"""Training tokens of the run so far, the axis of what is learned."""
STEP = "step"
"""Optimizer steps of the run so far, the axis of what the machine does."""
STAGE = "stage"
"""Number of the stage, as in its folder's name; 0 = the scratch teacher."""
AXES = {"train": TOKENS, "heldout": TOKENS, "speed": STEP, "memory": STEP}
"""Group -> its axis."""

_NAMES: dict[str, tuple[str, float]] = {
    "held_out_kl": ("heldout/kl", 1.0),
    "held_out_perplexity": ("heldout/perplexity", 1.0),
    "evaluations_since_better": ("heldout/evaluations_since_better", 1.0),
    "ended_early": ("heldout/ended_early", 1.0),
    "tokens_per_second": ("speed/tokens_per_second", 1.0),
    "sampling_tokens_per_second": ("speed/sampling_tokens_per_second", 1.0),
    "sampling_seconds": ("speed/sampling_seconds", 1.0),
    "seconds": ("speed/stage_seconds", 1.0),
    "peak_memory_bytes": ("memory/peak_gb", 1e-9),
}
"""Name in metrics.jsonl -> (name in trackers, factor). All others are figures of the training step: ``train/<name>``."""


def tracked(values: Mapping[str, float | None]) -> dict[str, float]:
    """The numbers of a line under the names of trackers; None and the axes are left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        # trackers have no null: values that are None stay in the file only
        if value is None or name == TOKENS:
            continue
        # figures of a text of a blend end with its name: held_out_kl.math
        figure, dot, text = name.partition(".")
        shown, factor = _NAMES.get(figure, (f"train/{figure}", 1.0))
        found[f"{shown}{dot}{text}"] = float(value) * factor
    return found


def stage_number(stage: str) -> int | None:
    """The number that a stage's name begins with; 0 for the scratch teacher, None for another name."""
    if stage == "teacher":
        return 0
    found = re.match(r"(\d+)-", stage)
    return int(found[1]) if found else None


def before(stage: str, rows: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """(steps, tokens) of the stages before ``stage`` in the lines of ``metrics.jsonl``."""
    own = stage_number(stage)
    ends: dict[str, tuple[int, int]] = {}
    for row in rows:
        number = stage_number(row["stage"])
        # by number and not by order of lines: a stage that runs again is written after later ones
        if own is not None and number is not None and number < own:
            steps, tokens = ends.get(row["stage"], (0, 0))
            ends[row["stage"]] = (max(steps, row["step"]), max(tokens, int(row.get(TOKENS) or 0)))
    return sum(steps for steps, _ in ends.values()), sum(tokens for _, tokens in ends.values())
