"""What the functions return: folders and figures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLE_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run."""

    folder: Path
    """The run folder."""
    report: dict[str, Any] = field(repr=False)
    """The content of report.json: ``stages``, ``exports``, ``baselines``, ``notes``, ``protocol`` and so on."""

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Row of the report by name of the stage, and of each export by its format; ``eval`` has perplexity, KL and their errors."""
        rows = {row["name"]: row for row in self.report["stages"]}
        return rows | {row["format"]: row for row in self.report["exports"]}

    @property
    def model(self) -> Path | None:
        """The last model folder that the run wrote; None if it wrote none."""
        made = [self.folder / row["name"] / "model" for row in self.report["stages"]]
        return next((folder for folder in reversed(made) if folder.is_dir()), None)

    @property
    def exports(self) -> dict[str, Path]:
        """Folder of each export by its format."""
        return {row["format"]: self.folder / row["path"] for row in self.report["exports"]}

    def table(self, width: int = TABLE_WIDTH) -> str:
        """The report's table as text of ``width`` characters; columns that do not fit are left out."""
        from ..report.tables import terminal_table
        from ..terminal.console import CleanConsole

        console = CleanConsole(width=width, color_system=None, markup=False, highlight=False)
        with console.capture() as shown:
            console.print(terminal_table(self.report, width))
        return shown.get()

    def __fspath__(self) -> str:
        """The last model folder, so that a result stands where a model is wanted."""
        return str(self.model or self.folder)


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """A model that a single stage made."""

    folder: Path
    """The model folder."""
    figures: dict[str, Any]
    """The stage's row of the report: sizes, sparsity, ``eval`` (perplexity, KL and so on), ``change``."""
    run: RunResult = field(repr=False)
    """The run of this one stage."""

    def __fspath__(self) -> str:
        """The model folder, so that a result stands where a model is wanted."""
        return str(self.folder)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What was measured of a model."""

    figures: dict[str, Any]
    """The model's row of the report; ``eval`` has perplexity, KL and their errors, ``tasks`` the scores by task."""
    teacher: dict[str, Any] | None
    """The teacher's row; None without one."""
    run: RunResult = field(repr=False)
    """The run of this one stage."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """An export that an independent reader has rebuilt."""

    folder: Path
    """The export's folder."""
    format: str
    bytes: int
    """Bytes of the files with weights."""
    exact: bool
    """Whether every weight is that of the source; False only with ``allow_inexact``."""
    runtimes: dict[str, Any]
    """What each installed runtime computed from it, by name."""

    def __fspath__(self) -> str:
        """The export's folder."""
        return str(self.folder)
