"""Compares a pruned folder with its record: the shape and the kept indices, the zeros of the masks, and the groups of a pattern.

``weights`` gives each tensor as it is stored, plain or rebuilt from an export, so that an export's zeros are counted too.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.axis_map import AXES, Axis, Family
from ...models.common.errors import UserError
from ...models.family_map import family_of
from ...models.folder.loading import load_config
from ...models.folder.model_folder import RECORD
from ...models.pruning.pattern import parse_pattern
from ...models.sizes import WORDS, sizes_of
from ..readers.open import open_export

Weights = Callable[[str], NDArray[np.float32]]
"""The tensor of a name; UserError if it cannot be read, KeyError if there is none."""
_UNREADABLE = (TypeError, KeyError, ValueError, AttributeError)


def kept_problems(path: Path, record: Mapping[str, Any]) -> tuple[list[str], str]:
    """(what disagrees between config, shape of the parent and kept indices, what agrees); ([], '') if no shape was cut."""
    if "kept" not in record:
        return [], ""
    try:
        config = load_config(str(path))
        family = family_of(config)
        return _kept(family, sizes_of(config, family).record(), record["parent_shape"], record["kept"])
    except UserError as error:
        return [str(error)], ""
    except _UNREADABLE as error:
        return [f"{RECORD}: the entry 'kept' or 'parent_shape' cannot be read ({type(error).__name__}: {error})"], ""


def _kept(family: Family, now: Mapping[str, int], parent: Mapping[str, int], kept: Mapping[str, Any]) -> tuple[list[str], str]:
    problems: list[str] = []
    told: list[str] = []
    layers = kept.get("layers", list(range(parent["layers"])))
    for axis in AXES:
        if axis not in kept:
            # fewer of both where each query head has its own keys and values, of which the record names the query heads
            if now[axis] != parent[axis] and not (axis == "kv_heads" and "heads" in kept and parent["heads"] == parent["kv_heads"]):
                problems.append(
                    f"config.json has {now[axis]} {WORDS[axis]}, the parent had {parent[axis]}, and {RECORD} lists none as kept"
                )
            continue
        lists = _lists(family, axis, kept[axis], layers)
        if lists is None:
            problems.append(f"{RECORD}: the kept {WORDS[axis]} are not those of the layers {layers}")
            continue
        for where, indices in lists.items():
            if len(indices) != now[axis]:
                problems.append(f"{RECORD} keeps {len(indices)} {WORDS[axis]}{where}, and config.json has {now[axis]}")
            elif any(later <= earlier for earlier, later in pairwise(indices)) or not 0 <= indices[0] <= indices[-1] < parent[axis]:
                problems.append(f"{RECORD}: the kept {WORDS[axis]}{where} are not ascending numbers from 0 to {parent[axis] - 1}")
        told.append(f"{now[axis]:,} of {parent[axis]:,} {WORDS[axis]}")
    return problems, f"config.json and the recorded indices agree: {', '.join(told)}"


def _lists(family: Family, axis: Axis, entry: Any, layers: list[int]) -> dict[str, list[int]] | None:
    """Where -> kept indices of an axis; None if the layers are not those that were kept."""
    if axis in ("hidden", "layers"):
        return {"": list(entry)}
    module = family.ffn if axis == "ffn" else family.attention
    if list(entry) != [f"{family.layers_path}.{layer}.{module}" for layer in layers]:
        return None
    return {f" in {name}": list(indices) for name, indices in entry.items()}


def stored_weights(path: Path) -> Weights:
    """The tensors of a folder, plain or packed, as fp32."""
    opened = open_export(path)

    def weight(name: str) -> NDArray[np.float32]:
        module = name.removesuffix(".weight")
        if module in opened.modules:
            return opened.decode(module).weight
        if name not in opened.shapes():
            raise KeyError(name)
        return opened.tensor(name)

    return weight


def zeros_problems(record: Mapping[str, Any], weights: Weights) -> tuple[list[str], str]:
    """(what is wrong with the zeros of the matrices that the record lists, what was counted); ([], '') if it lists none."""
    names = record.get("sparse") or []
    try:
        claimed = record.get("pruning") or {}
        pattern = parse_pattern(claimed["pattern"]) if "pattern" in claimed else None
        most = None if not claimed else int(claimed["kept"])
    except _UNREADABLE as error:
        return [f"{RECORD}: the entry 'pruning' cannot be read ({type(error).__name__}: {error})"], ""
    if not names:
        return [], ""
    problems: list[str] = []
    total = left = 0
    for name in names:
        try:
            weight = weights(f"{name}.weight")
        except KeyError:
            problems.append(f"{RECORD} lists {name} as sparse, and there is no such matrix")
            continue
        except UserError as error:
            problems.append(str(error))
            continue
        own = int(np.count_nonzero(weight))
        total, left = total + weight.size, left + own
        if own == weight.size:
            problems.append(f"{name} has no zero, and {RECORD} lists it as sparse")
        elif pattern is not None and not _follows(weight, pattern.kept, pattern.group):
            problems.append(f"{name} does not follow {pattern}: a group of {pattern.group} has more than {pattern.kept} weights")
    if most is not None and left > most:
        problems.append(f"{left:,} weights of the sparse matrices are not zero, and the masks keep {most:,}")
    share = f"{1 - left / total:.2%} of {total:,} weights are zero in the {len(names)} matrices that {RECORD} lists" if total else ""
    more = f", at most {most:,} are left" if most is not None else ""
    return problems, f"{share}{more}{f', and every group follows {pattern}' if pattern else ''}"


def _follows(weight: NDArray[np.float32], kept: int, group: int) -> bool:
    if weight.ndim != 2 or weight.shape[1] % group:
        return False
    return bool((np.count_nonzero(weight.reshape(-1, group), axis=1) <= kept).all())
