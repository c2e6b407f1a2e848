"""W&B: one run per run folder, readable without knowing decoct: grouped names, two axes, the recipe as config, the report as an artifact.

The W&B run id is kept in the run folder: online, a resumed run continues the same W&B run; offline (without a key), each part has the same
id and ``wandb sync`` joins them.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...models.common.files import write_text_atomic
from ..progress import print_line
from ..settings_watching import LoggerSettings
from .names import AXES, STAGE, STEP, TOKENS
from .tracker import Tracker

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger
    from rich.console import Console

RUN_ID_FILE = "wandb-run-id.txt"
DEFAULT_PROJECT = "decoct"


class WandbTracker(Tracker):
    """One W&B run.

    Args:
        logger: Lightning's logger of that run.
    """

    def __init__(self, logger: "WandbLogger") -> None:
        super().__init__(logger)
        self._wandb = logger
        self._run: Any = logger.experiment

    def table(self, key: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, which W&B can sort and plot."""
        self._wandb.log_table(key=key, columns=list(headings), data=[list(row) for row in rows])

    def picture(self, key: str, png: bytes) -> None:
        """A picture."""
        import io

        from PIL import Image

        self._wandb.log_image(key=key, images=[Image.open(io.BytesIO(png))])

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Final figures, which W&B lists next to the run's name."""
        self._run.summary.update(dict(figures))

    def files(self, paths: Sequence[Path]) -> None:
        """The report and the recipe, as an artifact of type report; a run that is resumed adds a version of it."""
        if self._run.disabled:
            return
        import wandb

        # copies in this part's own folder, because an offline part is uploaded later, when the originals may be those of a later start;
        # W&B's own copies would lie outside the run folder
        kept = Path(self._run.dir).parent / "report"
        kept.mkdir(exist_ok=True)
        artifact = wandb.Artifact(f"report-{self._run.id}", type="report", description="report and resolved recipe of a decoct run")
        for path in paths:
            artifact.add_file(str(shutil.copy2(path, kept)), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def finish(self, exit_code: int) -> None:
        """Ends the run, or this part of it."""
        self.logger.save()
        self._run.finish(exit_code=exit_code)


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


def open_wandb(settings: LoggerSettings, run_dir: Path, name: str, config: Mapping[str, Any], console: "Console | None") -> WandbTracker:
    """Starts or resumes the run's W&B run.

    Raises:
        UserError: W&B cannot start.
    """
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
    # Lightning's own axis counts for this process; hidden, as the other axes are, so that no panel draws them
    for axis in (TOKENS, STEP, STAGE, "trainer/global_step"):
        run.define_metric(axis, hidden=True)
    for group, axis in AXES.items():
        run.define_metric(f"{group}/*", step_metric=axis, step_sync=True)
    for figure in ("heldout/kl", "heldout/perplexity"):
        # the list of runs shows the best and the newest
        run.define_metric(figure, step_metric=AXES["heldout"], step_sync=True, summary="min,last")
    return WandbTracker(WandbLogger(name=name, save_dir=run_dir, project=arguments["project"], id=arguments["id"], experiment=run))
