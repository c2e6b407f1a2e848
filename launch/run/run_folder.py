"""The run folder: resolved recipe, versions, and one numbered folder per stage with the stage's state.

runs/<name>/recipe.yaml  versions.json  metrics.jsonl  report.{json,md,html}
runs/<name>/NN-kind/stage.json  model/  checkpoints/
"""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from ...models.common.files import check_writable_folder, clean_leftovers, write_bytes_atomic, write_json_atomic, write_text_atomic
from ...models.common.locks import Lock, acquire_or_refuse, is_held, no_locks
from ...models.common.seal import SEAL, seal_is_broken, sealed
from ...models.folder.model_folder import verify_folder_files
from .installed import installed_version

STAGE_FILE = "stage.json"
PARTS = "parts"
"""Folder in the run folder with copies of the files that the recipe imports."""
LOCK = ".lock"
"""Lock file in the run folder, held by its run."""
_PACKAGES = (
    "decoct",
    "torch",
    "lightning",
    "transformers",
    "triton",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "wandb",
    "tensorboard",
    "mlflow-skinny",
    "bitsandbytes",
)


def versions() -> dict[str, Any]:
    """Return Python, platform, cores, GPUs, package versions and commit: the context of every measured number."""
    import torch

    found = {package: installed_version(package) for package in _PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "packages": found,
        "commit": commit(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def commit() -> str | None:
    """Return the commit of the checkout that decoct runs from ('-dirty' when files differ); None for an installed wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        ask = {"cwd": here, "capture_output": True, "text": True, "timeout": 10}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **ask)
        # untracked files are left out: run folders and notes beside the code change no numbers
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **ask)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if head.returncode else head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def state_fault(state: Any) -> str:
    """Return what is wrong with the content of a stage.json; '' if every field in use is valid."""
    if not isinstance(state, dict):
        return "does not have the content that a stage writes"
    # a field that is absent is an older version's; one of another type would fail later, far from its cause
    wanted: dict[str, tuple[type, ...]] = {"key": (str,), "kind": (str,), "state": (str,), "makes_model": (bool,), "exports": (list,)}
    wanted |= {"tokens": (int, type(None)), "seconds": (int, float, type(None))}
    if state.get("state") == "done" and state.get("kind") != "student":
        missing = [name for name in ("makes_model", "exports") if name not in state]
        if missing:
            return f"says that the stage is done, but lacks {', '.join(missing)}"
    for name, kinds in wanted.items():
        if name in state and type(state[name]) not in kinds:
            return f"has an invalid {name}: {str(state[name])[:40]!r}"
    # the key becomes part of a folder's name when the stage is moved aside
    if not re.fullmatch("[0-9A-Za-z]{0,128}", state.get("key", "")):
        return "has an invalid key"
    for export in state.get("exports", []):
        inside = isinstance(export, dict) and isinstance(export.get("path"), str) and isinstance(export.get("format"), str)
        # a path out of the folder would have another folder verified and measured in the export's place
        if not inside or Path(export["path"]).is_absolute() or ".." in Path(export["path"]).parts:
            return "names an invalid export"
        if not isinstance(export.get("runtimes"), dict) or not all(isinstance(seen, dict) for seen in export["runtimes"].values()):
            return "names an export without the results of its runtimes"
    return ""


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder and the small JSON file with its progress."""

    path: Path

    @property
    def model(self) -> Path:
        """Return the path of the stage's model folder, which exists once it is complete."""
        return self.path / "model"

    def read(self) -> dict[str, Any]:
        """Return the content of stage.json; {} if the stage never started."""
        file = self.path / STAGE_FILE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            fault = state_fault(state) or ("has changed since it was written" if seal_is_broken(state) else "")
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            state, fault = {}, f"is not readable JSON ({type(error).__name__}: {error})"
        if fault:
            raise UserError(f"{file} {fault}; delete the folder {self.path} to run the stage again")
        # the checksum is of the file alone; what is read may be changed and written again
        state.pop(SEAL, None)
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Replace stage.json; its checksum reveals damage."""
        write_json_atomic(self.path / STAGE_FILE, sealed(state))

    def begin(self, key: str, kind: str) -> dict[str, Any]:
        """Prepare the folder for ``key``: work of the same key is kept, finished or not; other work is moved aside.

        Returns: the state of the same key ({} when it starts from nothing).
        """
        state = self.read()
        if state and state.get("key") != key:
            # kept, not deleted: it may be hours of training, and a changed setting may be a slip
            aside = self._aside(str(state.get("key", "unknown")))
            self.path.rename(aside)
            state = {}
        self.path.mkdir(parents=True, exist_ok=True)
        clean_leftovers(self.path)
        # whoever deletes a finished model wants it made again
        if state.get("state") == "done" and not self._whole(state):
            state = {}
        if state.get("state") != "done":
            # killed between the model folder and this file, or the folder was deleted: the checkpoints lead to the same model again
            shutil.rmtree(self.model, ignore_errors=True)
            self.write({"key": key, "kind": kind, "state": "running"})
        return state

    def _whole(self, state: dict[str, Any]) -> bool:
        """Return whether a finished stage's result still exists; UserError if it was changed."""
        made = [self.model] if state.get("makes_model") else []
        made += [self.path / export["path"] for export in state.get("exports", [])]
        if not all(folder.is_dir() for folder in made):
            return False
        for folder in made:
            # the hashes are compared before the next stage builds on the folder: damage must not end up in a model
            if problems := verify_folder_files(folder):
                raise UserError(f"{folder} is damaged: {problems[0]}; delete the folder and run again to make a new one")
        return True

    def drop_checkpoints(self, keep: int, step: int | None = None) -> None:
        """Delete the stage's checkpoints, its start state, rounds and layers, which only an unfinished stage needs.

        Args:
            keep: number of checkpoints that stay, the newest ones.
            step: the step whose checkpoint comes before the newest ones, because the stage's model is made of it.
        """
        for unfinished in ("start", "rounds", "local"):
            shutil.rmtree(self.path / unfinished, ignore_errors=True)
        # step numbers have leading zeros, so that names sort as numbers
        saves = sorted((self.path / "checkpoints").glob("step-*"), key=lambda save: (save.name == f"step-{step or 0:08d}", save.name))
        for folder in saves[: len(saves) - keep]:
            shutil.rmtree(folder, ignore_errors=True)

    def _aside(self, key: str) -> Path:
        base = self.path.with_name(f"{self.path.name}.{key[:8]}")
        return next(p for n in range(10_000) if not (p := base if n == 0 else base.with_name(f"{base.name}-{n}")).exists())


@dataclass(frozen=True)
class RunFolder:
    """``runs/<name>``."""

    path: Path

    @property
    def metrics(self) -> Path:
        """Return the file of training metrics, the local source of all curves."""
        return self.path / "metrics.jsonl"

    def lock(self, say: Callable[[str], None]) -> Lock:
        """Create the folder (UserError if it cannot be written) and lock it for this process.

        Raises: UserError if another run uses the folder; then nothing in it is changed.
        """
        check_writable_folder(self.path, "the run folder (runs/<name>, or --out)")
        lock = Lock(self.path / LOCK)
        acquire_or_refuse(lock, f"the run folder {self.path}", say)
        # some network file systems have no locks; the run goes on, but says that it cannot guard its folder
        if not lock.lockable:
            say(no_locks(lock.file))
        return lock

    def open(self, recipe_text: str, imports: Mapping[str, bytes] | None = None) -> None:
        """Create the folder (UserError when it cannot be written) with the resolved recipe and the versions in it.

        Args:
            recipe_text: The resolved recipe.
            imports: Name and content of each file that the recipe imports. Copies of earlier starts stay.
        """
        check_writable_folder(self.path, "the run folder (runs/<name>, or --out)")
        clean_leftovers(self.path)
        for name, source in (imports or {}).items():
            write_bytes_atomic(self.path / PARTS / name, source)
        write_text_atomic(self.path / "recipe.yaml", recipe_text)
        write_json_atomic(self.path / "versions.json", versions())

    def highest_missing(self) -> Path | None:
        """Return the highest folder of the path that creating the run folder would make; None if the run folder exists."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        return missing[-1] if missing else None

    def has_begun(self) -> bool:
        """Return whether a start has produced anything in the folder, or works in it."""
        written = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        return is_held(self.path / LOCK) or not written <= {"recipe.yaml", "versions.json", "outcome.json", ".session", PARTS, LOCK}

    def discard(self, highest: Path) -> None:
        """Remove the folder of a start that failed before it produced anything, and its empty parents up to ``highest``, inclusive."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in (self.path, *self.path.parents):
            # a parent that another run uses meanwhile is not empty, and stays with those above it
            with suppress(OSError):
                parent.rmdir()
            if parent == highest:
                break

    def stage(self, name: str) -> StageFolder:
        """Folder of the stage called ``NN-name``."""
        return StageFolder(self.path / name)
