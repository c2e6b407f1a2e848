"""What a model folder must be before anything in it is loaded.

transformers follows '../' and absolute names in a local index file and falls back to pickled weights, which can run code. Every file
that it would read is named, placed and checked here first.
"""

from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.json_file import read_json as read_json
from .codes_file import codes_file
from .config_checks import check_depth
from .hub import snapshot_root
from .record import check_record
from .refused_inputs import check_files
from .safetensors_read import read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_model_folder(folder: Path) -> list[Path]:
    """Check a model folder without loading it; returns the weight files that make up the model.

    Raises:
        UserError: no config.json, no safetensors (pickled weights are never read), an adapter, packed quantized weights, a name in
            the index that leaves the folder (absolute, '../', a link), a damaged safetensors file, or a file that is not the one
            that the folder's record names (``check_record``).
    """
    folder = Path(folder)
    check_files(folder)
    config = read_json(folder / "config.json")
    files = _weight_files(folder, config)
    root = snapshot_root(folder)
    tensors: dict[str, Path] = {}
    for file in sorted({*files, *folder.glob("*.safetensors"), *filter(None, [codes_file(folder)])}):
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{file} is a link to {file.resolve()}, outside the model folder; copy the file itself into the folder")
        names = read_header(file).tensors
        if file in files:
            if twice := sorted(names.keys() & tensors.keys()):
                raise UserError(
                    f"tensor {twice[0]!r} is in both {tensors[twice[0]].name} and {file.name} of {folder}; only one can be meant"
                )
            tensors.update(dict.fromkeys(names, file))
    check_depth(config, len(tensors), folder / "config.json")
    check_record(folder)
    return files


def _weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The safetensors files that transformers will read, by its own order of preference."""
    if any(folder.glob("shard-*-model-*.safetensors")):
        raise UserError(f"{folder} is a distributed training checkpoint; save the model as plain safetensors first (save_pretrained)")
    named = config.get("transformers_weights")
    if named is not None:
        named = _inside(folder, named, "config.json (transformers_weights)")
        return _indexed(named) if named.name.endswith(".index.json") else [named]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights only as {pickles[0]}: pickled files can run code when they are opened and are never read; convert "
            "them in a place you trust (AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors)"
        )
    raise UserError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}; the copy or download of the model is incomplete")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; fetch or export the model again")
    shards: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        shards.setdefault(_inside(index.parent, name, index.name), set()).add(tensor)
    for file, tensors in shards.items():
        if absent := sorted(tensors - read_header(file).tensors.keys()):
            raise UserError(f"{index} places tensor {absent[0]!r} in {file.name}, which does not hold it; fetch or export the model again")
    return sorted(shards)


def _is_short(name: str) -> bool:
    """Whether file systems take it: at most 255 bytes, no half characters."""
    try:
        return len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False


def _inside(folder: Path, name: Any, where: str) -> Path:
    """``folder / name`` for a plain file name of a file that really lies in the folder."""
    if not isinstance(name, str) or not name or name in (".", "..") or any(bad in name for bad in "/\\\0") or not _is_short(name):
        raise UserError(f"{where} of {folder} names the weight file {name!r:.200}; only plain file names inside the folder are allowed")
    file = folder / name
    if not file.resolve().is_relative_to(snapshot_root(folder)):
        raise UserError(f"{where} of {folder} names {name!r}, a link to {file.resolve()} outside the folder; copy the file itself there")
    if not file.is_file():
        raise UserError(f"{where} of {folder} names the weight file {name!r}, which is missing; the copy or download is incomplete")
    return file
