"""Weights in pickled files (pytorch_model.bin, with or without an index) as a source, read by torch's restricted loader alone.

A pickle is a program. ``torch.load(weights_only=True)`` runs none of it but the calls that build tensors; a file that asks for more is
refused. Only ``decoct import`` reads such files; a run refuses them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.files import sha256_file, sha256_json
from ..common.json_file import read_json
from .imported import ImportSource
from .load_report import check_report
from .loading import check_finite, load_config, load_tokenizer, meta_model
from .stored_names import ignored, module_names
from .tensor_places import inside_folder
from .weights import DTYPES

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_GENERATION = "generation_config.json"


def pickled_files(folder: Path) -> list[Path]:
    """The weight files of a folder that has only pickled ones; [] for any other folder.

    Raises:
        UserError: the index is damaged or names a file outside the folder.
    """
    # safetensors beside it are what transformers reads
    if any(folder.glob("*.safetensors")):
        return []
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{folder / INDEX} has no weight_map; fetch the model again")
    # a set: many tensors share a file
    return sorted({inside_folder(folder, name, INDEX) for name in places.values()})


def open_pickled(folder: Path) -> ImportSource:
    """The model of a folder with pickled weights, as a source.

    Raises:
        UserError: a file asks for more than tensors, or its weights are not those of config.json.
    """
    files = pickled_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _loaded(file).items():
            # which of two counts would depend on the order of the files
            if name in tensors:
                raise UserError(f"{folder}: the tensor {name!r:.200} is in two files; fetch the model again")
            tensors[name] = tensor
    config = load_config(folder)
    model = meta_model(config)
    kept = _kept(folder, model, tensors)
    facts = {file.name: sha256_file(file) for file in files}
    return ImportSource(
        what=str(folder),
        config=config,
        model_class=type(model).__name__,
        weights={name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()},
        read=lambda name: _checked(folder, name, kept[name]),
        write_others=lambda target: _write_others(folder, target),
        facts={
            "format": "pickle",
            "file": files[0].name if len(files) == 1 else f"{len(files)} files",
            "sha256": facts[files[0].name] if len(files) == 1 else sha256_json(facts),
            "name": folder.name,
        },
    )


def _loaded(file: Path) -> dict[str, Tensor]:
    try:
        # mapped: the weights stay on disk until they are read
        # only zip archives can be mapped; the older format is read whole
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # pickle, zip and torch raise many kinds
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{file} is not a file of tensors alone, and nothing of it was run: {first:.300}. Only torch's restricted loader reads pickled "
            "files here; save the model as safetensors where you trust it (save_pretrained), or fetch it again"
        ) from error
    # some trainers wrap the weights in a dict
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in content.items()):
        raise UserError(f"{file} holds no state dict (names and tensors); give the weights of a model that save_pretrained wrote")
    return content


def _is_zip(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def _kept(folder: Path, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to write: without constants that transformers computes and copies of tied weights."""
    inside, left_out = module_names(model, tensors), set(ignored(model, tensors))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    # None: transformers splits or joins weights of this family, and names cannot be compared
    if None not in inside.values():
        found = {inside[name] or name: tuple(tensor.shape) for name, tensor in kept.items()}
        report = {
            # of two tied names one is enough
            "missing_keys": {name for name, _ in model.named_parameters() if name not in found and tied.get(name) not in found},
            "unexpected_keys": found.keys() - own.keys(),
            "mismatched_keys": {(name, shape, own[name]) for name, shape in found.items() if own.get(name, shape) != shape},
            "error_msgs": [],
        }
        check_report(folder, model, report)
    # a copy of a tied weight is written once; one that differs is a weight of its own
    for name in list(kept):
        source = next((other for other in kept if inside[other] == tied.get(inside[name] or name)), None)
        if source is not None and source != name and torch.equal(kept[name], kept[source]):
            del kept[name]
    wrong = next((name for name, tensor in kept.items() if tensor.dtype not in DTYPES.values()), None)
    if wrong is not None:
        raise UserError(f"{folder}: {wrong} is stored as {kept[wrong].dtype}, not in plain floats; give the unquantized model")
    return kept


def _checked(folder: Path, name: str, tensor: Tensor) -> Tensor:
    check_finite(folder, name, tensor, tensor.dtype)
    return tensor


def _write_others(folder: Path, target: Path) -> None:
    from .older_readers import mend_tokenizer_config

    load_tokenizer(folder).save_pretrained(target)
    mend_tokenizer_config(target / "tokenizer_config.json")
    if (folder / _GENERATION).is_file():
        content = read_json(folder / _GENERATION)
        (target / _GENERATION).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
