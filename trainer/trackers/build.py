"""Starts and ends the trackers that a recipe asks for, and refuses before any work what cannot start."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ..settings_watching import LoggerSettings
from .tracker import Tracker
from .wandb_run import open_wandb, wandb_mode

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = {"tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"), "mlflow": (("mlflow",), "mlflow-skinny")}
"""Kind -> (modules of which one is enough, what pip calls the package)."""


def check_trackers(settings: LoggerSettings) -> None:
    """Raises UserError, before any work, if a package is missing or the environment does not let a tracker start."""
    for kind in settings.kind:
        modules, package = _PACKAGES.get(kind, ((), ""))
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise UserError(
                f"logger: {kind} needs the package {package}, which is not installed here: pip install 'decoct[{kind}]' (or pip install "
                f"{package}). The curves are always in metrics.jsonl of the run folder too; logger: csv or none needs no package."
            )
    if "wandb" in settings.kind:
        wandb_mode()


def build_trackers(
    settings: LoggerSettings, run_dir: Path, *, name: str, config: Mapping[str, Any], console: "Console | None" = None
) -> list[Tracker]:
    """Starts the trackers of a run; call it only on rank 0, once per process.

    Args:
        settings: Kinds of trackers, and the run's place in them.
        run_dir: Folder for all files that a tracker writes.
        name: Display name of the run.
        config: Plain data of the resolved recipe.
        console: Prints where curves go that are not sent anywhere.

    Raises:
        UserError: a tracker cannot start.
    """
    check_trackers(settings)
    made: list[Tracker] = []
    for kind in settings.kind:
        if kind == "csv":
            from lightning.pytorch.loggers import CSVLogger

            # without a version the logger makes a new folder per start: it deletes the files of a folder that is not empty
            made.append(Tracker(CSVLogger(save_dir=run_dir, name="csv")))
        elif kind == "wandb":
            made.append(open_wandb(settings, run_dir, name, config, console))
        elif kind == "tensorboard":
            from .tensorboard_files import open_tensorboard

            made.append(open_tensorboard(run_dir, config, console))
        elif kind == "mlflow":
            from .mlflow_files import open_mlflow

            made.append(open_mlflow(settings, run_dir, name, config, console))
    return made


def finish_trackers(trackers: Sequence[Tracker], *, exit_code: int = 0) -> None:
    """Writes everything and ends the runs. A process that is killed before this loses nothing of ``metrics.jsonl``."""
    for tracker in trackers:
        tracker.finish(exit_code)
