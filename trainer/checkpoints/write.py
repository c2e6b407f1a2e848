"""Writes a checkpoint: every rank writes its own part into one temporary folder, and rank 0 commits it with one rename.

All ranks write a sharded tensor, each its own rows. A tensor that every rank holds whole (DDP, buffers, step counts) is written by one
rank, chosen so that all write about the same number of bytes.
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
from ..processes.sharding import Rows, copy_of, local, row_range
from ..processes.world import World, gather_bytes
from .read import FORMAT, GROUPS, MANIFEST, PIECES, STATE, Pieces, TrainingState, drop_old, step_folder

Groups = Mapping[str, Mapping[str, Tensor | Rows]]
"""Tensors to save by group and name; the same names on every rank."""


def save_checkpoint(
    folder: Path, state: TrainingState, groups: Groups, generators: bytes, world: World, *, before: Callable[[], None] | None = None
) -> Path:
    """Writes ``folder/step-XXXXXXXX`` completely or not at all, then removes the ones that are not kept. All ranks must call it.

    Args:
        folder: Folder of the stage's checkpoints.
        state: Progress of the stage.
        groups: Tensors of each of ``GROUPS``; a missing group is empty.
        generators: This rank's generator state.
        world: This process among all ranks.
        before: Called first on rank 0; its errors are treated as disk errors.

    Raises:
        UserError: on every rank if one of them could not write (disk full, no permission, ...); earlier checkpoints are unchanged.
    """
    # Every rank takes part in the same four gathers, in this order: sizes, folder, reports, outcome. A rank that fails before one sends its
    # problem instead of raising alone, so no rank waits for another that has left.
    target = step_folder(folder, state.step)
    own = {group: _own_part(groups.get(group, {}), world) for group in GROUPS}
    needed = sum(_bytes(t) for tensors in own.values() for t in tensors.values()) + len(generators)
    total = sum(int(part) for part in gather_bytes(str(needed).encode()))
    problem = ""
    try:
        with ExitStack() as stack:
            # rank 0 makes the folder and sends its name: the name is random, and with a full disk no rank begins to write
            temporary = _agree(_open(stack, folder, target, total, before) if world.is_first else {"folder": "", "problem": ""})[0][
                "folder"
            ]
            # returns when this rank's bytes are on the disk: the rename below must not commit a file that a power failure could still lose
            written = _write_own(Path(temporary), own, generators, world.rank)
            reports = _agree({**written, "pieces": _describe(groups, own, world.rank)})
            if world.is_first:
                # leaving the block renames the folder; on an exception (a report with a problem, a full disk) it is removed
                _write_index(Path(temporary), state, reports)
    # every rank has raised it after the same gather, so none may wait in the last one
    except _RefusedByAllError:
        raise
    except (OSError, UserError) as error:  # only on rank 0: the index, or the rename
        problem = str(error)
    # all ranks meet once more, so that no rank goes on before the rename has succeeded
    _agree({"problem": problem})
    if world.is_first:
        drop_old(folder)
    return target


class _RefusedByAllError(UserError):
    """A failure that every rank already knows."""


def _agree(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's report, in rank order; raises on every rank if one of them reports a problem."""
    reports = [json.loads(part) for part in gather_bytes(json.dumps(report).encode())]
    # all ranks have the same reports, so all raise or none does
    if problems := [report["problem"] for report in reports if report["problem"]]:
        raise _RefusedByAllError("; ".join(problems))
    return reports


def _own_part(tensors: Mapping[str, Tensor | Rows], world: World) -> dict[str, Tensor]:
    """The tensors that this rank writes: its rows of sharded ones, and its share of the others, each given to the least loaded rank."""
    # row_range is None for a tensor that every rank holds whole
    sharded = {name for name, tensor in tensors.items() if row_range(tensor) is not None}
    # under hsdp other ranks hold the same rows; the first of them writes
    own = {name: local(tensors[name]) for name in tensors if name in sharded and copy_of(tensors[name]) == 0}
    shared = {name: local(tensor) for name, tensor in tensors.items() if name not in sharded}
    load = [0] * world.size
    # the same order on every rank, so that all ranks compute the same assignment without talking
    for name, tensor in sorted(shared.items(), key=lambda item: (-_bytes(item[1]), item[0])):
        rank = load.index(min(load))
        load[rank] += _bytes(tensor)
        if rank == world.rank:
            own[name] = tensor
    return own


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _open(stack: ExitStack, folder: Path, target: Path, total: int, before: Callable[[], None] | None) -> dict[str, Any]:
    """Makes the temporary folder on rank 0; it becomes ``target`` when the stack is left without an exception."""
    try:
        # the metrics are flushed before the checkpoint exists, so that no checkpoint is ahead of its metrics
        if before is not None:
            before()
        folder.mkdir(parents=True, exist_ok=True)
        # a megabyte more for index, state and manifest. The check spares hours of writing into a disk that is known to be too small
        check_free_space(folder, total + (1 << 20), f"checkpoint {target.name}")
        return {"folder": str(stack.enter_context(atomic_directory(target))), "problem": ""}
    except (OSError, UserError) as error:
        return {"folder": "", "problem": str(error)}


def _write_own(temporary: Path, own: Mapping[str, Mapping[str, Tensor]], generators: bytes, rank: int) -> dict[str, Any]:
    """Writes this rank's files; returns ``{"files": {name: {bytes, sha256}}, "problem": text}``."""
    written: list[Path] = []
    try:
        for group, tensors in own.items():
            written.append(temporary / f"{group}-{rank}.safetensors")
            write_safetensors(written[-1], tensors)
        written.append(temporary / f"rng-{rank}.safetensors")
        written[-1].write_bytes(generators)
        for path in written:
            # here and not on rank 0, because on a network file system a machine can only flush what it has written itself
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return {"files": {path.name: _fingerprint(path) for path in written}, "problem": ""}
    except OSError as error:
        return {"files": {}, "problem": f"rank {rank}: {error}"}


def _describe(groups: Groups, own: Mapping[str, Mapping[str, Tensor]], rank: int) -> Pieces:
    """The place of this rank's part of each tensor, for ``pieces.json``."""
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
    """Writes, on rank 0, the places of all pieces, the state, and the manifest of all files."""
    index: Pieces = {group: {} for group in GROUPS}
    for report in reports:
        for group, tensors in report["pieces"].items():
            for name, entry in tensors.items():
                # reports come in rank order, so the pieces of a tensor end up in the order of their rows
                index[group].setdefault(name, {"shape": entry["shape"], "pieces": []})["pieces"] += entry["pieces"]
    (temporary / PIECES).write_text(json.dumps(index))
    (temporary / STATE).write_text(json.dumps(asdict(state), indent=1))
    files = {name: found for report in reports for name, found in report["files"].items()}
    files |= {name: _fingerprint(temporary / name) for name in (PIECES, STATE)}
    # last, with the hashes of all others. The fsync of these three files is that of the folder's commit
    (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": state.step, "files": files}, indent=1))
