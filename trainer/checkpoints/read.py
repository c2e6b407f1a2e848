"""Reads checkpoints of a training stage: one folder per save, committed by one rename, verified by hash before it is read.

    checkpoints/step-00000120/student-<rank>.safetensors     this rank's part of parameters and saved buffers
                              optimizer-<rank>.safetensors   "<parameter>.exp_avg" and the like
                              hooks-<rank>.safetensors       "<hook>/<tensor>": masks
                              rng-<rank>.safetensors         generators of each rank
                              pieces.json                    shape of every tensor, and which rows are in which file
                              state.json                     step, tokens, seconds, plan
                              manifest.json                  size and sha256 of every file above

Any number of ranks may have written it under any strategy, and any other number may read it: a rank puts together a tensor, or the rows
that it needs, from the pieces. Two checkpoints are kept, and those that they name as the best of the stage; an older one is removed only
after the newer one is complete on disk. A damaged folder is set aside, and the one before it is used. No checkpoint holds the teacher, and
nothing is pickled. ``write.py`` writes them.
"""

import json
import os
import secrets
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.files import clean_leftovers, sha256_file

# raised when a change of the layout would make an older reader misread it: a folder of another format counts as damaged
FORMAT = 2
# two, so that a damaged newest checkpoint costs the steps of one interval and not the stage
KEPT = 2
MANIFEST = "manifest.json"
PIECES = "pieces.json"
STATE = "state.json"
GROUPS = ("student", "optimizer", "hooks")
"""Kinds of tensors; each rank writes one file per group."""

Pieces = dict[str, dict[str, dict[str, Any]]]
"""group -> tensor -> {"shape": [...], "pieces": [[file, first row, past the last row], ...]}; a whole tensor has one piece, rows null."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Progress of a stage: what a resumed run needs in addition to the tensors."""

    step: int
    """Optimizer steps done."""
    sample_index: int
    """Windows consumed of the endless permuted stream, over all ranks."""
    tokens: int
    """Input tokens trained on, without padding."""
    seconds: float
    """Training time so far, over all starts."""
    world: int
    """Number of ranks that wrote it."""
    plan: dict[str, Any]
    """``TrainingPlan.identity()``; a stage with another plan must not continue from it."""
    best: int | None = None
    """Step of the checkpoint with the best weights so far, which is kept beside the newest ones; None = none is asked for."""
    standing: dict[str, Any] | None = None
    """The evaluations so far (``Standing.plain``); None = none counted yet."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files have the recorded hashes."""

    path: Path
    state: TrainingState
    index: Pieces = field(repr=False)

    def names(self, group: str) -> list[str]:
        """Names of the tensors of a group (one of ``GROUPS``)."""
        return list(self.index[group])

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self.index[group][name]["shape"])

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Dtype of a tensor; no row of it is read."""
        return self.read(group, name, (0, 0) if self.shape(group, name) else None).dtype

    def read(self, group: str, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows ``rows[0]`` to ``rows[1]`` (excluded), on the CPU; only these rows are read."""
        from safetensors import safe_open

        parts: list[Tensor] = []
        for file, first, last in self.index[group][name]["pieces"]:
            with safe_open(self.path / file, framework="pt") as opened:
                # a whole tensor is one piece, in the file of the rank that was chosen to write it
                if first is None:
                    return opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows[0] : rows[1]]
                # the part of this piece that is wanted, in rows of the whole tensor; the file counts from its own first row
                start, stop = (max(first, rows[0]), min(last, rows[1])) if rows else (first, last)
                # a piece without any of these rows adds an empty part, which still has the dtype and the other dimensions
                parts.append(
                    opened.get_slice(name)[start - first : max(start, stop) - first] if start < last else opened.get_slice(name)[:0]
                )
        # pieces are in rank order, which is the order of rows
        return torch.cat(parts)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, whole, on the CPU."""
        return {name: self.read(group, name) for name in self.names(group)}

    def generators(self, rank: int) -> bytes | None:
        """Generator state of a rank; None if the run that saved had fewer ranks."""
        path = self.path / f"rng-{rank}.safetensors"
        return path.read_bytes() if path.exists() else None


def open_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Opens the checkpoint of ``step``, which another rank has verified.

    Raises:
        OSError, ValueError, KeyError, TypeError: it cannot be read.
    """
    path = step_folder(folder, step)
    state = TrainingState(**json.loads((path / STATE).read_text()))
    # type() and not isinstance: JSON's true is an int to Python, and equals 1
    if type(state.step) is not int or state.step != step or not isinstance(state.plan, dict):
        raise ValueError(f"{STATE} is not the state of step {step}")
    return Checkpoint(path, state, json.loads((path / PIECES).read_text()))


def find_newest_verified(folder: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """(the newest undamaged checkpoint or None, the damaged newer ones with their faults)."""
    damaged: list[tuple[Path, str]] = []
    # newest first, and only until one verifies: reading every byte of an older one would be wasted
    for path in step_folders(folder):
        # damaged files may raise anything of the parsers: each such error only means that this checkpoint cannot be used
        try:
            _verify(path)
            return open_checkpoint(folder, int(path.name.removeprefix("step-"))), damaged
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            damaged.append((path, str(error) or type(error).__name__))
    return None, damaged


def fault_of(folder: Path, step: int) -> str:
    """What is wrong with the checkpoint of ``step``; '' if it verifies."""
    try:
        _verify(step_folder(folder, step))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return str(error) or type(error).__name__
    return ""


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that its step can be saved again; the next successful save removes it."""
    # outside the pattern step-*, so that neither a resume nor the count of kept checkpoints sees it
    target = path.with_name(f"damaged-{path.name}")
    if target.exists():
        remove(target)
    return path.rename(target)


def prepare_folder(folder: Path) -> None:
    """Creates the folder and removes leftovers of killed saves."""
    folder.mkdir(parents=True, exist_ok=True)
    clean_leftovers(folder)


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of ``step``."""
    return folder / f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    # by name: the step has a fixed number of digits. Only a rename gives this name, so whatever has it was complete once
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True) if folder.is_dir() else []


def drop_old(folder: Path) -> None:
    """Removes all checkpoints but the newest ``KEPT`` and the best ones that these name, and those that were set aside."""
    found = step_folders(folder)
    named = {step_folder(folder, best) for path in found[:KEPT] if (best := _best_of(path)) is not None}
    for old in [*(path for path in found[KEPT:] if path not in named), *folder.glob("damaged-step-*")]:
        remove(old)


def _best_of(path: Path) -> int | None:
    """The step that a checkpoint names as the best; None if it names none, or cannot be read."""
    try:
        best = json.loads((path / STATE).read_text()).get("best")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return best if type(best) is int else None


def remove(path: Path) -> None:
    """Removes a folder."""
    # renamed to a leftover first: a removal that is killed half way must not look like a damaged checkpoint
    leftover = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    path.rename(leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def _verify(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} lists no files")
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']} is not the one this version writes ({FORMAT})")
    for name, expected in manifest["files"].items():
        # a name with folders could make this read, and later a load, files outside the checkpoint
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a file name")
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        # the size first: a truncated file is found without reading it
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if sha256_file(path / name) != expected["sha256"]:
            raise ValueError(f"the content of {name} is not what was written (sha256 differs)")
    # a manifest that lists too few files would verify too: the state, verified above, has the number of ranks that wrote
    ranks = range(json.loads((path / STATE).read_text())["world"])
    wanted = {STATE, PIECES, *(f"{group}-{rank}.safetensors" for group in GROUPS for rank in ranks)}
    if not wanted <= manifest["files"].keys():
        raise ValueError("the manifest does not list every file")
