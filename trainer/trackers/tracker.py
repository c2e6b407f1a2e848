"""What every tracker takes: numbers, tables, pictures, final figures, the files of the report. One that cannot show something leaves it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


class Tracker:
    """A view of a run. It is used on rank 0 alone, from the start of a process to ``finish``.

    Args:
        logger: Lightning's logger.
    """

    def __init__(self, logger: "Logger") -> None:
        self.logger = logger

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of an optimizer step; ``step`` counts over all stages of the run."""
        self.logger.log_metrics(dict(numbers), step=step)

    def table(self, key: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table."""

    def picture(self, key: str, png: bytes) -> None:
        """A picture: the bytes of a PNG file."""

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Final figures of the run."""

    def files(self, paths: Sequence[Path]) -> None:
        """The report and the resolved recipe."""

    def finish(self, exit_code: int) -> None:
        """Writes everything and ends this process's part of the run."""
        self.logger.save()
        self.logger.finalize("success" if exit_code == 0 else "failed")
