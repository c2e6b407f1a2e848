"""What a run folder and the cache hold that nobody needs any more: found with sizes first, removed only on demand.

A model that the run's report names, an export, and whatever an unfinished stage resumes from are never among it.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.common.cache_folder import cache_folder
from ...models.common.errors import UserError
from ...models.common.locks import is_held
from ..run.run_folder import STAGE_FILE, RunFolder
from .overview import RECIPE

_ASIDE = re.compile(r"(\d\d-.+)\.[0-9A-Za-z]{1,8}(-\d+)?")
_STAGE = re.compile(r"\d\d-.+")
_CACHED = {
    "tokens": "tokenized text, made again when a run needs it",
    "teachers": "a scratch teacher, trained again when a run needs it",
    "scores": "scores of a model that was cut, computed again when it is cut again",
    "teacher-caches": "a teacher's predictions, computed again when a run needs them",
}


@dataclass(frozen=True)
class Leftover:
    """A folder that can go."""

    path: Path
    bytes: int
    why: str


def run_leftovers(run: Path) -> list[Leftover]:
    """What can be removed from a run folder, the largest first.

    Raises:
        UserError: it is no run folder, or its recipe or a stage.json is damaged.
    """
    if not (run / RECIPE).is_file():
        raise UserError(f"{run} is not a run folder: it has no {RECIPE}; name one, such as runs/quickstart (`decoct runs` lists them)")
    needed = _named_by_report(run)
    found = [Leftover(path, _size(path), why) for path, why in _candidates(run) if path.exists() and not _holds(path, needed)]
    # what is empty frees nothing
    return sorted((one for one in found if one.bytes), key=lambda one: -one.bytes)


def cache_leftovers() -> list[Leftover]:
    """Every entry of the shared cache that no process is making, the largest first."""
    found = []
    for name, why in _CACHED.items():
        for entry in sorted((cache_folder() / name).glob("*")):
            # locks inside it and beside it: any of them may be held by a process that makes it, or the entry of which it is a part
            whole = entry.name.split(".", 1)[0]
            making = [entry, *entry.parent.glob(f"{whole}.*"), *(entry.rglob("*.lock") if entry.is_dir() else ())]
            if entry.is_dir() and not any(is_held(file) for file in making if file.is_file()):
                found.append(Leftover(entry, _size(entry), why))
    return sorted(found, key=lambda one: -one.bytes)


def remove(leftovers: list[Leftover]) -> int:
    """Remove them; returns the bytes that are free now.

    Raises:
        UserError: the disk refuses one; those before it are gone.
    """
    freed = 0
    for one in leftovers:
        try:
            shutil.rmtree(one.path)
        except OSError as error:
            raise UserError(f"{one.path} cannot be removed ({error.strerror or error}); {freed:,} bytes were freed before it") from error
        freed += one.bytes
    return freed


def _candidates(run: Path) -> Iterator[tuple[Path, str]]:
    from ...configs.loader import outline_of

    # the model that the first stage starts from, which is no stage of the recipe
    stages = {"00-student", *(entry.name for entry in outline_of(run / RECIPE).stages)}
    # what a link leads to belongs to another place
    for folder in sorted(path for path in run.iterdir() if path.is_dir() and not path.is_symlink()):
        name = folder.name
        # what is being written has a hidden name that ends in .tmp (``models/common/files.py``)
        if name.startswith("."):
            if name.endswith(".tmp"):
                yield folder, "half written by a start that died"
            continue
        if not _STAGE.fullmatch(name):
            continue
        # an older stage is set aside as NAME.KEY; a stage of the recipe may be called so itself, and then it stays
        aside = _ASIDE.fullmatch(name)
        if name not in stages and aside and aside[1] in stages:
            yield folder, f"superseded: {aside[1]} was made again with other settings"
        # only what a run has made: a user may keep other folders here
        elif name not in stages and (folder / STAGE_FILE).is_file():
            yield folder, "superseded: the recipe has no such stage any more"
        elif RunFolder(run).stage(name).read().get("state") == "done":
            yield folder / "checkpoints", "the stage is done"
            yield folder / "start", "the stage is done"
    for packed in sorted((run / ".measured").glob("teacher-rtn-*")):
        yield packed, "the teacher rounded for scale, by a scheme of before"


def _named_by_report(run: Path) -> list[Path]:
    """Folders that the rows of report.json name, inside the run folder."""
    try:
        report: Any = json.loads((run / "report.json").read_text(encoding="utf-8"))
        rows = [row for part in ("stages", "exports", "baselines") for row in report.get(part) or []]
        named = [row["path"] for row in rows if isinstance(row, dict) and isinstance(row.get("path"), str)]
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
    return [(run / path).resolve() for path in named]


def _holds(path: Path, needed: list[Path]) -> bool:
    """Whether removing ``path`` would remove one of ``needed``."""
    own = path.resolve()
    return any(one == own or one.is_relative_to(own) for one in needed)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    # a link takes its own bytes only
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())
