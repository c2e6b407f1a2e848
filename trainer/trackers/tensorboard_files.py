"""TensorBoard: event files in the run folder, without a server. ``tensorboard --logdir runs`` shows all runs beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.terminal_text import printable
from ..progress import print_line
from .tracker import Tracker

if TYPE_CHECKING:
    from lightning.pytorch.loggers import TensorBoardLogger
    from rich.console import Console

FOLDER = "tensorboard"


def open_tensorboard(run_dir: Path, config: Mapping[str, Any], console: "Console | None") -> "TensorBoardTracker":
    """Opens the event files of a run."""
    if console is not None:
        print_line(console, f"TensorBoard logs into {run_dir / FOLDER}; `tensorboard --logdir {run_dir.parent}` shows it")
    return TensorBoardTracker(run_dir, config)


class TensorBoardTracker(Tracker):
    """Event files of a run: each start adds one, and hides what an earlier start wrote beyond the checkpoint.

    Args:
        run_dir: The run folder.
        config: Plain data of the resolved recipe, shown as text.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        super().__init__(_logger(run_dir))
        self._run_dir, self._config = run_dir, config
        self._step: int | None = None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        if self._step is None:
            # The first line of this start: a resumed run takes the steps since its checkpoint again, and TensorBoard drops what earlier
            # files hold from there on. A stage's evaluation before its first step stands at the last step of the stage before, which stays.
            trained = any(name.startswith("train/") for name in numbers)
            self.logger = _logger(self._run_dir, purge_step=step if trained else step + 1)
            self._text("recipe", _as_code(self._config))
        self._step = step
        super().log(numbers, step)

    def table(self, key: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, as text."""
        lines = [headings, ["---"] * len(headings), *rows]
        self._text(key, "\n".join("| " + " | ".join("" if cell is None else _cell(cell) for cell in line) + " |" for line in lines))

    def picture(self, key: str, png: bytes) -> None:
        """A picture."""
        import io

        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self.logger.experiment.add_image(key, pixels, self._step or 0, dataformats="HWC")  # pyright: ignore[reportAttributeAccessIssue]

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Final figures, as scalars at the last step."""
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        self.logger.log_metrics(numbers, step=self._step or 0)

    def files(self, paths: Sequence[Path]) -> None:
        """The report, as text."""
        for path in paths:
            if path.suffix == ".md":
                self._text("report", path.read_text(encoding="utf-8"))

    def _text(self, key: str, text: str) -> None:
        self.logger.experiment.add_text(key, text, self._step or 0)  # pyright: ignore[reportAttributeAccessIssue]


def _logger(run_dir: Path, **more: Any) -> "TensorBoardLogger":
    from lightning.pytorch.loggers import TensorBoardLogger

    # without name and version the files lie directly in the folder: every start adds one
    return TensorBoardLogger(save_dir=run_dir, name=FOLDER, version="", default_hp_metric=False, **more)


def _as_code(config: Mapping[str, Any]) -> str:
    import yaml

    # four spaces make a block of code in Markdown
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return "".join(f"    {line}\n" for line in text.splitlines())


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else printable(str(value))
    return text.replace("|", "\\|")
