"""MLflow in the run folder: a file store without a server. ``mlflow ui --backend-store-uri RUN/mlruns`` shows it.

The id of the MLflow run is kept in the run folder, so a resumed run goes on with the same one.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...models.common.files import write_text_atomic
from ..progress import print_line
from ..settings_watching import LoggerSettings
from .tracker import Tracker

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger
    from rich.console import Console

FOLDER = "mlruns"
RUN_ID_FILE = "mlflow-run-id.txt"
DEFAULT_EXPERIMENT = "decoct"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_./ -]")
_LONGEST = 250
"""Characters of a parameter that every version of MLflow takes."""


def open_mlflow(
    settings: LoggerSettings, run_dir: Path, name: str, config: Mapping[str, Any], console: "Console | None"
) -> "MlflowTracker":
    """Opens the run's MLflow run, or starts it.

    Raises:
        UserError: MLflow cannot start.
    """
    # newer versions refuse file stores unless this says that one is wanted
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from lightning.pytorch.loggers import MLFlowLogger

    class OneRun(MLFlowLogger):
        """Goes on after a stage: Lightning would end the run with each of them."""

        def finalize(self, status: str = "success") -> None:
            """Leaves the run open; ``MlflowTracker.finish`` ends it."""

    known = _known_run(run_dir)
    try:
        logger = OneRun(
            experiment_name=settings.project or DEFAULT_EXPERIMENT,
            run_name=name,
            # absolute, and never a server: what MLFLOW_TRACKING_URI names is not meant for the files of this folder
            tracking_uri=(run_dir.resolve() / FOLDER).as_uri(),
            run_id=known,
        )
        tracker = MlflowTracker(logger)
        # the run exists from here on
        identifier = str(logger.run_id)
        if known is None:
            tracker.parameters(config)
        logger.experiment.update_run(identifier, status="RUNNING")
    except Exception as error:
        # MLflow's own errors derive from Exception alone, and importing it here may fail in many ways
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"logger: mlflow cannot start: {reason}. Remove {run_dir / FOLDER}, or leave mlflow out.") from error
    write_text_atomic(run_dir / RUN_ID_FILE, identifier + "\n")
    if console is not None:
        where = run_dir / FOLDER
        print_line(console, f"MLflow logs into {where} (run id {identifier}); `mlflow ui --backend-store-uri {where}` shows it")
    return tracker


def _known_run(run_dir: Path) -> str | None:
    """The id of the run in this folder; None if there is none, or its files are gone."""
    try:
        known = (run_dir / RUN_ID_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    if not re.fullmatch("[0-9a-f]{32}", known) or not any((run_dir / FOLDER).glob(f"*/{known}/meta.yaml")):
        return None
    return known


class MlflowTracker(Tracker):
    """One MLflow run.

    Args:
        logger: Lightning's logger of that run.
    """

    def __init__(self, logger: "MLFlowLogger") -> None:
        super().__init__(logger)
        self._mlflow = logger
        self._step = 0

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        self._step = step
        super().log(numbers, step)

    def parameters(self, config: Mapping[str, Any]) -> None:
        """The resolved recipe, one parameter per value. MLflow lets no parameter change, so this is done once per run."""
        flat = {_NOT_IN_NAMES.sub("_", key): str(value)[:_LONGEST] for key, value in _flat(config)}
        self._mlflow.log_hyperparams(flat)

    def table(self, key: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, as a CSV file."""
        import csv
        import io

        out = io.StringIO()
        csv.writer(out).writerows([headings, *rows])
        self._client.log_text(self._mlflow.run_id, out.getvalue(), f"{key}.csv")

    def picture(self, key: str, png: bytes) -> None:
        """A picture, as a file."""
        import tempfile

        # MLflow copies files; its own way for pictures decodes and encodes them again
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{key}.png"
            file.write_bytes(png)
            self._client.log_artifact(self._mlflow.run_id, str(file))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Final figures, as metrics of the last step."""
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        self._mlflow.log_metrics(numbers, step=self._step)

    def files(self, paths: Sequence[Path]) -> None:
        """The report and the recipe."""
        for path in paths:
            self._client.log_artifact(self._mlflow.run_id, str(path))

    def finish(self, exit_code: int) -> None:
        """Ends the run."""
        self._mlflow.save()
        self._client.set_terminated(self._mlflow.run_id, "FINISHED" if exit_code == 0 else "FAILED")

    @property
    def _client(self) -> Any:
        return self._mlflow.experiment


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path with slashes, value) of everything that is neither a mapping nor a list of mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{path}/{number}")
    else:
        yield path, value
