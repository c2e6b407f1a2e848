"""MetricsSink writes one JSON line per optimizer step to ``metrics.jsonl``, the record of a run, and the same numbers to trackers."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.files import append_line, write_text_atomic
from ..trackers.names import STAGE, STEP, TOKENS, before, stage_number, tracked

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from ..trackers.tracker import Tracker

Number = int | float | None


class MetricsSink:
    """Writes the numbers of training stages.

    Args:
        path: ``metrics.jsonl`` of the run, with the lines of all stages. None (ranks other than 0) writes nothing.
        trackers: They get the numbers under the names of ``trackers.names``, with steps and tokens counted over all stages.
    """

    def __init__(self, path: Path | None, trackers: Sequence["Tracker"] = ()) -> None:
        self.path = path
        self.trackers = list(trackers) if path is not None else []
        self._before: dict[str, tuple[int, int]] = {}

    def write(self, stage: str, step: int, values: Mapping[str, Number]) -> None:
        """Appends ``{stage, step, **values}``; trackers get the values that are not None."""
        if self.path is None:
            return
        # one write per line, not synced: a killed process loses nothing, and a power failure at most what the next rewind would drop anyway
        append_line(self.path, {"stage": stage, "step": step, **values})
        if not self.trackers:
            return
        steps, tokens = self._offsets(stage)
        numbers = {**tracked(values), STEP: float(steps + step)}
        if (own := values.get(TOKENS)) is not None:
            numbers[TOKENS] = float(tokens + own)
        if (number := stage_number(stage)) is not None:
            numbers[STAGE] = float(number)
        for tracker in self.trackers:
            tracker.log(numbers, steps + step)

    @property
    def loggers(self) -> list["Logger"]:
        """Lightning's loggers of the trackers."""
        return [tracker.logger for tracker in self.trackers]

    def _offsets(self, stage: str) -> tuple[int, int]:
        """(steps, tokens) of the stages before, which no longer change while this one trains."""
        if stage not in self._before:
            assert self.path is not None
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
            self._before[stage] = before(stage, [row for line in lines if (row := read_row(line)) is not None])
        return self._before[stage]

    def rewind(self, stage: str, step: int) -> None:
        """Removes a stage's lines after ``step``, which a resumed run writes again, and incomplete lines."""
        if self.path is None or not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        # half a line, which a kill can leave, counts as beyond the checkpoint
        kept = "".join(f"{line}\n" for line in text.split("\n") if line.strip() and not _is_beyond(line, stage, step))
        if kept != text:
            write_text_atomic(self.path, kept)

    def flush(self) -> None:
        """Forces the lines to the disk. Called before a checkpoint is committed, so that no checkpoint is ahead of its metrics."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def read_row(line: str) -> dict[str, Any] | None:
    """Parses a line of ``metrics.jsonl`` into ``stage``, ``step`` and numbers; None if it is incomplete or damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or type(row.get("step")) is not int:
        return None
    return {name: value for name, value in row.items() if name == "stage" or value is None or type(value) in (int, float)}


def _is_beyond(line: str, stage: str, step: int) -> bool:
    row = read_row(line)
    # a stage that starts anew is evaluated before its first step again, and that line has step 0
    return row is None or (row["stage"] == stage and (step == 0 or row["step"] > step))
