"""Finds the safetensors files of a model folder and the place of each tensor in them: the only reader of indices on this side.

transformers follows '../' and absolute names in a local index file and falls back to pickled weights, which can run code. Here names are
checked before any file is opened, and pickled weights are refused. ``qat.readers`` has its own reader on purpose: it verifies exports
independently of this code.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import UserError
from ..common.json_file import read_json
from .hub import snapshot_root
from .safetensors_read import TensorInfo, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class TensorPlace(NamedTuple):
    """Place of a tensor."""

    file: Path
    info: TensorInfo
    """Dtype, shape and byte range in the file."""


def tensor_places(files: Iterable[Path]) -> dict[str, TensorPlace]:
    """Every tensor of several safetensors files by name, in the order of the files and of their bytes.

    Raises:
        UserError: a file is damaged (see ``read_header``), or two files have the same name.
    """
    places: dict[str, TensorPlace] = {}
    for file in files:
        for name, info in read_header(file).tensors.items():
            # readers disagree on which of two copies counts, so neither is taken
            if name in places:
                raise UserError(
                    f"tensor {name!r} is in both {places[name].file.name} and {file.name} of {file.parent}; only one can be meant"
                )
            places[name] = TensorPlace(file, info)
    return places


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads, by its own order of preference; ``config.json`` may name one.

    Raises:
        UserError: no safetensors (pickled weights are never read), a name that leaves the folder (absolute, '../', a link), a file
            that is missing, or an index that is damaged or names a file without its tensor.
    """
    config = folder / "config.json"
    # a folder of weights without a config has no preference
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    # names of PyTorch's distributed checkpoints, whose files hold parts of tensors
    if any(folder.glob("shard-*-model-*.safetensors")):
        raise UserError(f"{folder} is a distributed training checkpoint; save the model as plain safetensors first (save_pretrained)")
    if named is not None:
        named = inside_folder(folder, named, "config.json (transformers_weights)")
        return _indexed(named) if named.name.endswith(".index.json") else [named]
    # a single file wins over an index, as in transformers
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights only as {pickles[0]}: pickled files can run code when they are opened and are never read in a run; "
            f"convert them first: decoct import {folder} --out MODEL (it reads tensors alone, and refuses a file that asks for more), or "
            "where you trust them with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), which writes safetensors"
        )
    if gguf := next(folder.glob("*.gguf"), None):
        raise UserError(f"{folder} has its weights only as {gguf.name}; give that file itself: {gguf}")
    raise UserError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}; the copy or download of the model is incomplete")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; fetch or export the model again")
    shards: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        # several tensors share a file, which is checked once
        shards.setdefault(inside_folder(index.parent, name, index.name), set()).add(tensor)
    # found here, because a wrong index would later show only as a missing weight
    for file, tensors in shards.items():
        if absent := sorted(tensors - read_header(file).tensors.keys()):
            raise UserError(f"{index} places tensor {absent[0]!r} in {file.name}, which does not hold it; fetch or export the model again")
    # in the order of names, so that tensors come in the same order on every machine
    return sorted(shards)


def _is_short(name: str) -> bool:
    """Whether file systems accept the name: at most 255 bytes, no lone surrogates."""
    try:
        return len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False


def inside_folder(folder: Path, name: Any, where: str) -> Path:
    """``folder / name`` for a plain file name, after a check that the file is really in the folder."""
    if not isinstance(name, str) or not name or name in (".", "..") or any(bad in name for bad in "/\\\0") or not _is_short(name):
        raise UserError(f"{where} of {folder} names the weight file {name!r:.200}; only plain file names inside the folder are allowed")
    file = folder / name
    # links are followed first: a plain name can still point out of the folder
    if not file.resolve().is_relative_to(snapshot_root(folder)):
        raise UserError(f"{where} of {folder} names {name!r}, a link to {file.resolve()} outside the folder; copy the file itself there")
    if not file.is_file():
        raise UserError(f"{where} of {folder} names the weight file {name!r}, which is missing; the copy or download is incomplete")
    return file
