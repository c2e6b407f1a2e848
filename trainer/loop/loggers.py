"""Experiment trackers through Lightning's loggers: W&B (offline without a key), CSV, or none.

``metrics.jsonl`` is the record; trackers are views of it. The W&B run id is kept in the run folder: online, a resumed run continues the
same W&B run; offline, each part has the same id and ``wandb sync`` joins them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...models.common.files import write_text_atomic
from ..progress import print_line
from ..settings import LoggerSettings

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from PIL.Image import Image
    from rich.console import Console

RUN_ID_FILE = "wandb-run-id.txt"
DEFAULT_PROJECT = "decoct"
TOKENS = "tokens"
"""Name of the stage's training tokens so far, the x-axis of every curve."""


def build_loggers(
    settings: LoggerSettings, run_dir: Path, *, name: str, config: Mapping[str, Any], console: "Console | None" = None
) -> list["Logger"]:
    """Starts the loggers of a run; call it only on rank 0, once per process.

    Args:
        settings: Kind of logger, and its place in W&B.
        run_dir: Folder for all files that a logger writes.
        name: Display name of the run.
        config: Plain data of the resolved recipe.
        console: Prints a line if W&B sends nothing.
    """
    if settings.kind == "none":
        return []
    if settings.kind == "csv":
        from lightning.pytorch.loggers import CSVLogger

        # without a version the logger makes a new folder per start: it deletes the files of a folder that is not empty
        return [CSVLogger(save_dir=run_dir, name="csv")]
    return [_wandb(settings, run_dir, name, config, console)]


def log_table(loggers: Sequence["Logger"], key: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Logs a table to every logger that supports tables."""
    for logger in _wandb_loggers(loggers):
        logger.log_table(key=key, columns=list(headings), data=[list(row) for row in rows])


def log_image(loggers: Sequence["Logger"], key: str, picture: "Path | bytes | Image") -> None:
    """Logs a picture (a PNG file, the bytes of one, or a PIL image) to every logger that supports pictures."""
    for logger in _wandb_loggers(loggers):
        logger.log_image(key=key, images=[_opened(picture)])


def log_summary(loggers: Sequence["Logger"], figures: Mapping[str, Any]) -> None:
    """Sets final figures, which trackers list next to the run's name."""
    for logger in _wandb_loggers(loggers):
        logger.experiment.summary.update(dict(figures))


def finish_loggers(loggers: Sequence["Logger"], *, exit_code: int = 0) -> None:
    """Writes everything and ends the runs. A process that is killed before this loses nothing of ``metrics.jsonl``."""
    for logger in loggers:
        logger.save()
    for logger in _wandb_loggers(loggers):
        logger.experiment.finish(exit_code=exit_code)


def wandb_run_id(run_dir: Path) -> str:
    """The W&B id of a run folder; made at the first call and the same afterwards."""
    path = run_dir / RUN_ID_FILE
    if path.exists() and re.fullmatch("[A-Za-z0-9_-]{1,64}", known := path.read_text(encoding="utf-8", errors="replace").strip()):
        return known
    import secrets
    import string

    made = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    write_text_atomic(path, made + "\n")
    return made


def has_wandb_key() -> bool:
    """Whether W&B can log in without asking: WANDB_API_KEY, an identity token, or an entry in netrc. The key itself is not read."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for place in places:
        try:
            if host in netrc.netrc(str(place)).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


_MODES = {name: name for name in ("online", "offline", "disabled", "shared")} | {"dryrun": "offline", "run": "online"}
"""Values of WANDB_MODE; the last two are W&B's old names."""


def wandb_mode() -> str:
    """The mode of W&B: WANDB_DISABLED and WANDB_MODE decide if they are set; else online with a key and offline without.

    Raises:
        UserError: WANDB_MODE is not a mode of W&B.
    """
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "y", "on", "t"):
        return "disabled"
    given = os.environ.get("WANDB_MODE", "").strip()
    if not given:
        return "online" if has_wandb_key() else "offline"
    if given.lower() not in _MODES:
        raise UserError(f"the environment variable WANDB_MODE={given!r} is not one of online, offline and disabled; change or unset it")
    return _MODES[given.lower()]


def check_logger(settings: LoggerSettings) -> None:
    """Raises UserError, before any work, if the environment does not let the logger start."""
    if settings.kind == "wandb":
        wandb_mode()


def wandb_arguments(settings: LoggerSettings, run_dir: Path, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``wandb.init``; the mode is that of ``wandb_mode``."""
    import wandb

    mode = wandb_mode()
    return {
        "name": name,
        # absolute, because the W&B service that writes may have been started by a parent process in another folder
        "dir": str(run_dir.resolve()),
        "id": wandb_run_id(run_dir),
        "project": settings.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        "entity": settings.entity,
        "group": settings.group,
        "tags": list(settings.tags) or None,
        "mode": mode,
        # offline there is no run on the server to resume: parts with the same id are joined when they are uploaded
        "resume": "allow" if mode == "online" else None,
        "config": dict(config),
        # W&B's console capture breaks progress bars, and code and command line may hold private data
        "settings": wandb.Settings(console="off", silent=True, save_code=False, disable_git=True, x_disable_meta=True),
    }


def _wandb(settings: LoggerSettings, run_dir: Path, name: str, config: Mapping[str, Any], console: "Console | None") -> "Logger":
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    arguments = wandb_arguments(settings, run_dir, name, config)
    if arguments["mode"] != "online" and console is not None:
        text = f"W&B logs {arguments['mode']} into {run_dir / 'wandb'} (run id {arguments['id']}); `wandb sync` uploads it after a login"
        if arguments["mode"] == "disabled":
            text = "W&B is switched off (WANDB_MODE or WANDB_DISABLED); metrics.jsonl has the curves"
        print_line(console, text)
    # started here, because the logger's own start passes arguments that wandb warns of
    try:
        run = wandb.init(**arguments)
    except (wandb.Error, ValueError, TypeError, OSError) as error:
        # invalid settings in the environment or in W&B's own files, or an invalid key
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"logger: wandb cannot start: {reason}. WANDB_MODE=offline logs into the run folder only.") from error
    # over tokens, because steps of stages with batches of different sizes are not comparable
    run.define_metric(TOKENS, hidden=True)
    run.define_metric("*", step_metric=TOKENS, step_sync=True)
    return WandbLogger(name=name, save_dir=run_dir, project=arguments["project"], id=arguments["id"], experiment=run)


def _wandb_loggers(loggers: Sequence["Logger"]) -> list[Any]:
    from lightning.pytorch.loggers import WandbLogger

    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


def _opened(picture: "Path | bytes | Image") -> Any:
    if not isinstance(picture, bytes):
        return str(picture) if isinstance(picture, Path) else picture
    import io

    from PIL import Image

    return Image.open(io.BytesIO(picture))
