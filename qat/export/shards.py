"""Writing tensors one file at a time, none larger than 5 GB, so that a large model is never held whole in packed form."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ...models.folder.safetensors_write import write_safetensors
from ...models.folder.tensor_places import INDEX, WEIGHTS

SHARD_BYTES = 5_000_000_000
"""The limit that transformers uses."""


def plan_shards(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Return file name -> names of its tensors, filled in the order of ``sizes`` (tensor name -> bytes).

    No file holds more than ``limit`` bytes, except for one with a single larger tensor.
    """
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        # a tensor is never split: one above the limit gets a file of its own
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    # one file has no index, as transformers writes it
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": names for number, names in enumerate(files, 1)}


def write_shards(folder: Path, shards: Mapping[str, list[str]], make: Callable[[str], Tensor]) -> None:
    """Write every file of ``shards``, and the index when there is more than one.

    Args:
        folder: An existing folder.
        shards: Result of ``plan_shards``.
        make: Returns the tensor of a name; called once per tensor, when its file is written.
    """
    total = 0
    for file, names in shards.items():
        # the tensors of one file are in memory at a time
        tensors = {name: make(name) for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        write_safetensors(folder / file, tensors, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
