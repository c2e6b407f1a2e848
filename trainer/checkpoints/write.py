"""Saving a checkpoint: every rank writes its own part into one temporary folder, rank 0 commits it with one rename.

A sharded tensor is written by all ranks, each its own rows. A tensor that every rank holds whole (DDP, buffers, step counts) is written
by one of them, chosen so that all write about the same number of bytes.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ...models.common.errors import UserError
from ...models.common.files import atomic_directory, check_free_space, sha256_file
from ...models.folder.safetensors_write import write_safetensors
from ..processes.sharding import Rows, local, row_range
from ..processes.world import World, gather_bytes
from .read import FORMAT, GROUPS, MANIFEST, PIECES, STATE, Pieces, TrainingState, drop_old, step_folder

Groups = Mapping[str, Mapping[str, Tensor | Rows]]
"""Tensors to save by group and name; the same names on every rank."""


def save_checkpoint(
    folder: Path, state: TrainingState, groups: Groups, generators: bytes, world: World, *, before: Callable[[], None] | None = None
) -> Path:
    """Write ``folder/step-XXXXXXXX`` whole or not at all, then drop all but the newest two; every rank calls it.

    Args:
        groups: Tensors of each of ``GROUPS``; a group left out is empty.
        generators: This rank's generator state.
        before: Called on rank 0 first; what it raises counts as a disk that refuses.

    Raises: UserError on every rank when one of them could not write (disk full, no permission, ...); earlier checkpoints are then as
    they were.
    """
    target = step_folder(folder, state.step)
    own = {group: _own_part(groups.get(group, {}), world) for group in GROUPS}
    needed = sum(_bytes(t) for tensors in own.values() for t in tensors.values()) + len(generators)
    total = sum(int(part) for part in gather_bytes(str(needed).encode()))
    problem = ""
    try:
        with ExitStack() as stack:
            temporary = _agree(_open(stack, folder, target, total, before) if world.is_first else {"folder": "", "problem": ""})[0][
                "folder"
            ]
            written = _write_own(Path(temporary), own, generators, world.rank)
            reports = _agree({**written, "pieces": _describe(groups, own, world.rank)})
            if world.is_first:
                _write_index(Path(temporary), state, reports)
    except _RefusedByAllError:
        raise
    except (OSError, UserError) as error:  # rank 0 alone: the index, or the rename
        problem = str(error)
    _agree({"problem": problem})
    if world.is_first:
        drop_old(folder)
    return target


class _RefusedByAllError(UserError):
    """A failure that every rank knows of already."""


def _agree(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's report, in rank order; raises on every rank when one of them tells of a problem."""
    reports = [json.loads(part) for part in gather_bytes(json.dumps(report).encode())]
    if problems := [report["problem"] for report in reports if report["problem"]]:
        raise _RefusedByAllError("; ".join(problems))
    return reports


def _own_part(tensors: Mapping[str, Tensor | Rows], world: World) -> dict[str, Tensor]:
    """What this rank writes: its rows of sharded tensors, and its share of the others, largest first to the least laden rank."""
    own = {name: local(tensor) for name, tensor in tensors.items() if row_range(tensor) is not None}
    shared = {name: local(tensor) for name, tensor in tensors.items() if name not in own}
    load = [0] * world.size
    for name, tensor in sorted(shared.items(), key=lambda item: (-_bytes(item[1]), item[0])):
        rank = load.index(min(load))
        load[rank] += _bytes(tensor)
        if rank == world.rank:
            own[name] = tensor
    return own


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _open(stack: ExitStack, folder: Path, target: Path, total: int, before: Callable[[], None] | None) -> dict[str, Any]:
    """Rank 0 makes the temporary folder, which becomes ``target`` when the stack is left without an exception."""
    try:
        if before is not None:
            before()
        folder.mkdir(parents=True, exist_ok=True)
        check_free_space(folder, total + (1 << 20), f"checkpoint {target.name}")
        return {"folder": str(stack.enter_context(atomic_directory(target))), "problem": ""}
    except (OSError, UserError) as error:
        return {"folder": "", "problem": str(error)}


def _write_own(temporary: Path, own: Mapping[str, Mapping[str, Tensor]], generators: bytes, rank: int) -> dict[str, Any]:
    """Write this rank's files; returns ``{"files": {name: {bytes, sha256}}, "problem": text}``."""
    written: list[Path] = []
    try:
        for group, tensors in own.items():
            written.append(temporary / f"{group}-{rank}.safetensors")
            write_safetensors(written[-1], tensors)
        written.append(temporary / f"rng-{rank}.safetensors")
        written[-1].write_bytes(generators)
        for path in written:
            # on a network file system a rank can only flush what it wrote itself
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return {"files": {path.name: _fingerprint(path) for path in written}, "problem": ""}
    except OSError as error:
        return {"files": {}, "problem": f"rank {rank}: {error}"}


def _describe(groups: Groups, own: Mapping[str, Mapping[str, Tensor]], rank: int) -> Pieces:
    """Where this rank's part of each tensor lies."""
    return {
        group: {
            name: {
                "shape": list(groups[group][name].shape),
                "pieces": [[f"{group}-{rank}.safetensors", *(row_range(groups[group][name]) or (None, None))]],
            }
            for name in tensors
        }
        for group, tensors in own.items()
    }


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _write_index(temporary: Path, state: TrainingState, reports: list[dict[str, Any]]) -> None:
    """Rank 0 writes where every piece lies, the state, and the manifest over all files."""
    index: Pieces = {group: {} for group in GROUPS}
    for report in reports:
        for group, tensors in report["pieces"].items():
            for name, entry in tensors.items():
                index[group].setdefault(name, {"shape": entry["shape"], "pieces": []})["pieces"] += entry["pieces"]
    (temporary / PIECES).write_text(json.dumps(index))
    (temporary / STATE).write_text(json.dumps(asdict(state), indent=1))
    files = {name: found for report in reports for name, found in report["files"].items()}
    files |= {name: _fingerprint(temporary / name) for name in (PIECES, STATE)}
    (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": state.step, "files": files}, indent=1))
