"""Checkpoints of a training stage: a new folder per save, committed by one rename, verified by hash before it is read.

    checkpoints/step-00000120/student.safetensors     parameters and saved buffers, tied tensors once
                              optimizer.safetensors   "<parameter>.exp_avg" and the like
                              hooks.safetensors       "<hook>/<tensor>": masks
                              rng-<rank>.safetensors  generators of each rank
                              state.json              step, tokens, seconds, plan
                              manifest.json           size and sha256 of every file above

Two are kept, and the older one goes only after the newer is whole on disk. A damaged folder is set aside and the one before
it used. The teacher is in none of them, and nothing is pickled.
"""

import json
import os
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.errors import UserError
from ..models.files import atomic_directory, check_free_space, clean_leftovers, sha256_file

FORMAT = 1
KEPT = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a stage stood: what a resumed run must know besides the tensors."""

    step: int
    """Optimizer steps done."""
    sample_index: int
    """Windows consumed of the endless permuted stream, over all ranks."""
    tokens: int
    """Input tokens trained on (padding not counted)."""
    seconds: float
    """Training time so far, over all starts."""
    world: int
    """Ranks that wrote their generators."""
    plan: dict[str, Any]
    """``TrainingPlan.identity()``: another plan must not continue from here."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files all have the recorded hashes."""

    path: Path
    state: TrainingState

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of ``<name>.safetensors``, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")

    def generators(self, rank: int) -> bytes | None:
        """Generator state of a rank; None when the saving run had fewer ranks."""
        path = self.path / f"rng-{rank}.safetensors"
        return path.read_bytes() if path.exists() else None


def student_tensors(student: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied tensor appears once, under its first name."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def load_student_tensors(student: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy saved values into the student in place; names, shapes and dtypes must be the same."""
    current = student_tensors(student)
    if different := sorted(current.keys() ^ saved.keys()):
        raise UserError(f"the checkpoint holds another model: {len(different)} names differ, the first is {different[0]}")
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            raise UserError(
                f"the checkpoint holds another model: {name} is {tuple(saved[name].shape)} {saved[name].dtype}, "
                f"the model has {tuple(tensor.shape)} {tensor.dtype}"
            )
        tensor.copy_(saved[name])


def optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as ``<parameter name>.<state name>``."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    return {f"{names[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``: moments on the parameter's device, step counts where they were saved (CPU)."""
    parameters = dict(student.named_parameters())
    optimizer.state.clear()
    for full, value in saved.items():
        name, key = full.rsplit(".", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    *,
    student: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    hooks: Mapping[str, Tensor],
    generators: Sequence[bytes],
) -> Path:
    """Write ``folder/step-XXXXXXXX`` whole or not at all, then drop all but the newest two.

    Raises: OSError or SafetensorError when the disk does not take it; UserError when too little space is free. Earlier
    checkpoints are then as they were.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    groups = {"student": student, "optimizer": optimizer, "hooks": hooks}
    needed = sum(t.numel() * t.element_size() for tensors in groups.values() for t in tensors.values())
    check_free_space(folder, needed + (1 << 20), f"checkpoint of step {state.step}")
    target = folder / f"step-{state.step:08d}"
    with atomic_directory(target) as temporary:
        for name, tensors in groups.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, temporary / f"{name}.safetensors")
        for rank, data in enumerate(generators):
            (temporary / f"rng-{rank}.safetensors").write_bytes(data)
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": state.step, "files": files}, indent=1))
    for old in [*_step_folders(folder)[KEPT:], *folder.glob("damaged-step-*")]:
        _remove(old)
    return target


def find_newest_verified(folder: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose every byte is as written, and the damaged ones before it with what is wrong."""
    damaged: list[tuple[Path, str]] = []
    for path in _step_folders(folder):
        try:
            return Checkpoint(path, _verify(path)), damaged
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append((path, str(error) or type(error).__name__))
    return None, damaged


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again; the next good save removes it."""
    target = path.with_name(f"damaged-{path.name}")
    if target.exists():
        _remove(target)
    return path.rename(target)


def prepare_folder(folder: Path) -> None:
    """Create the folder and remove what a killed save left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    clean_leftovers(folder)


def _step_folders(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True) if folder.is_dir() else []


def _verify(path: Path) -> TrainingState:
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']} is not the one this version writes ({FORMAT})")
    for name, expected in manifest["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file name")
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if sha256_file(path / name) != expected["sha256"]:
            raise ValueError(f"the content of {name} is not what was written (sha256 differs)")
    if not {"student.safetensors", "optimizer.safetensors", "hooks.safetensors", "state.json"} <= manifest["files"].keys():
        raise ValueError("the manifest does not list every file")
    return TrainingState(**json.loads((path / "state.json").read_text()))


def _remove(path: Path) -> None:
    """Rename to a leftover's name first: a removal that is killed half way must not look like a damaged checkpoint."""
    leftover = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    path.rename(leftover)
    shutil.rmtree(leftover, ignore_errors=True)
