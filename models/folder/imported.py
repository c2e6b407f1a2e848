"""Writes a plain model folder from weights of another form: GGUF, a model with an adapter, pickled weights.

Weights are read and written one by one. Names and shapes are compared with the model that the config describes before a weight is read.
The folder is written under a temporary name and renamed, so it is complete or absent.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..common.files import atomic_directory, check_free_space, clean_leftovers
from ..common.host_memory import available_bytes
from ..common.quiet import quiet_transformers
from .import_card import card_of
from .older_readers import with_older_fields
from .record import write_record
from .safetensors_write import Planned, write_planned

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

SHARD_BYTES = 5 * 10**9
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ImportSource:
    """A model in another form, opened and checked; no weight is read yet."""

    what: str
    """File or folder, for messages."""
    config: "PreTrainedConfig"
    weights: Mapping[str, "tuple[torch.dtype, tuple[int, ...]]"]
    """Name in transformers' files -> dtype that holds the values exactly, and shape."""
    read: "Callable[[str], Tensor]"
    """The values of a weight, in its dtype."""
    write_others: Callable[[Path], None]
    """Writes tokenizer and generation settings into the new folder."""
    facts: dict[str, Any]
    """Where the weights come from: the entry ``imported`` of the record."""
    model_class: str = ""
    """Class of transformers that loads it; '' if it was not built."""


def check_fits(source: ImportSource, model: "PreTrainedModel", names: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are not exactly those of the model.

    Args:
        source: The source.
        model: Its model on the meta device.
        names: Name in files -> shape of every tensor of the model.

    Raises:
        UserError: a weight is missing, unexpected or of another shape.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    # a tied weight may be left out: it is stored under the other name
    missing = [name for name in names if name not in source.weights and name not in tied]
    unexpected = [name for name in source.weights if name not in names]
    wrong = [f"{name} {shape} vs {names[name]}" for name, (_, shape) in source.weights.items() if names.get(name, shape) != shape]
    kinds = {"are missing": missing, "are unexpected": unexpected, "have another shape": wrong}
    found = [f"{len(some)} {kind}: {_few(some)}" for kind, some in kinds.items() if some]
    if found:
        raise UserError(f"the weights in {source.what} are not those of the {model.config.model_type} it describes; {'; '.join(found)}")


def write_imported(target: Path, source: ImportSource, dtype: "torch.dtype | None" = None) -> Path:
    """Write the model folder of ``source``.

    Args:
        target: New folder.
        source: Checked source.
        dtype: Dtype of all weights, rounded once; None keeps each one's own, which is exact.

    Raises:
        UserError: ``target`` exists, the disk or the memory is too small, or a value is not finite (also after rounding).
    """
    target = Path(target)
    planned = {name: (_word(dtype or own), shape) for name, (own, shape) in source.weights.items()}
    clean_leftovers(target.parent)
    _check_room(target, source, planned)
    with atomic_directory(target) as folder:
        _write_weights(folder, source, planned)
        write_config(folder, source, planned)
        source.write_others(folder)
        facts = {**source.facts, **({"stored_as": _word(dtype)} if dtype is not None else {})}
        (folder / "README.md").write_text(card_of(target.name, facts, source.config.model_type), encoding="utf-8")
        write_record(folder, {"kind": "import", "base_model": facts.get("name") or facts.get("file"), "imported": facts})
    return target


def write_config(folder: Path, source: ImportSource, planned: Mapping[str, Planned]) -> None:
    """Write config.json as transformers does, with the dtype of most weights."""
    # by elements, not by tensors: norms are many and small
    sizes: dict[str, int] = {}
    for dtype, shape in planned.values():
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    with quiet_transformers():
        source.config.save_pretrained(folder)
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content |= {"dtype": max(sizes, key=lambda name: sizes[name])} | ({"architectures": [source.model_class]} if source.model_class else {})
    # code of a repository is never copied
    content = with_older_fields({key: value for key, value in content.items() if key != "auto_map"})
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _check_room(target: Path, source: ImportSource, planned: Mapping[str, Planned]) -> None:
    import torch

    sizes = [math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in planned.values()]
    # the largest tensor as stored and in fp32, and a copy in another order
    needed = max((3 * 4 * math.prod(shape) for _, shape in planned.values()), default=0)
    free = available_bytes()
    if free is not None and needed > free:
        raise UserError(f"importing {source.what} needs about {needed:,} bytes of memory for its largest tensor; {free:,} are free")
    # 16 MB for headers, tokenizer and config
    check_free_space(target.parent, sum(sizes) + 2**24, f"the model of {source.what}")


def _write_weights(folder: Path, source: ImportSource, planned: Mapping[str, Planned]) -> None:
    import torch

    def make(name: str) -> "Tensor":
        values = source.read(name)
        dtype = getattr(torch, planned[name][0])
        if values.dtype == dtype:
            return values
        rounded = values.to(dtype)
        # fp16 ends at 65,504: a finite fp32 value can become infinite
        if not bool(rounded.isfinite().all()):
            raise UserError(f"{name} of {source.what} has values beyond the range of {planned[name][0]}; import it in another dtype")
        return rounded

    shards = _shards(planned)
    # one file without an index, as transformers writes it
    if len(shards) == 1:
        write_planned(folder / "model.safetensors", planned, make, {"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_planned(folder / file, {name: planned[name] for name in names}, make, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in planned.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(planned: Mapping[str, Planned]) -> list[list[str]]:
    """Names in groups of at most ``SHARD_BYTES``, in order; a larger tensor is alone."""
    import torch

    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in planned.items():
        bytes_ = math.prod(shape) * getattr(torch, dtype).itemsize
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _word(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
