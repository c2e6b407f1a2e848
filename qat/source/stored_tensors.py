"""The tensors of a model folder under the names that transformers writes, whatever the folder calls them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.folder.folder_checks import check_model_folder
from ...models.folder.model_folder import read_record
from ...models.folder.safetensors_read import read_header
from ...models.folder.stored_names import ignored, not_loaded, summary
from ...models.folder.structure import Structure


@dataclass(frozen=True)
class StoredFiles:
    """Where tensors are."""

    files: dict[str, Path]
    """Which file has a tensor, in file order."""
    shapes: dict[str, tuple[int, ...]]
    other_names: dict[str, str]
    """What the file calls it, where that differs."""
    left_out: dict[str, int]
    """Number of tensors that transformers does not load, by what they belong to; those that it computes itself do not count."""

    def record(self, folder: Path) -> dict[str, Any]:
        """``decoct.json`` of the folder, what is left out noted in it."""
        return read_record(folder) | ({"left_out": self.left_out} if self.left_out else {})

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return read_tensor(self.files[name], self.other_names.get(name, name))


def checked_files(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every tensor of a model folder by the name that it has there: (file, shape).

    Raises:
        UserError: see ``check_model_folder``.
    """
    headers = {file: read_header(file).tensors for file in check_model_folder(folder)}
    return {name: (file, tensors[name].shape) for file, tensors in headers.items() for name in tensors}


def stored_files(found: dict[str, tuple[Path, tuple[int, ...]]], structure: Structure) -> StoredFiles:
    """``checked_files`` as the model of ``structure`` has them; tensors that transformers leaves out are left out."""
    left_out: dict[str, int] = {}
    if structure.model is not None and not found.keys() <= structure.shapes.keys():
        left_out = summary(not_loaded(structure.model, found))
        outside = set(ignored(structure.model, found))
        found = {name: place for name, place in found.items() if name not in outside}
    names = structure.in_files(found)
    return StoredFiles(
        files={names[name]: file for name, (file, _) in found.items()},
        shapes={names[name]: shape for name, (_, shape) in found.items()},
        other_names={names[name]: name for name in found if names[name] != name},
        left_out=left_out,
    )


def check_tied(folder: Path, stored: StoredFiles, structure: Structure) -> None:
    """A tied weight that is stored under a second name must repeat the first: it is written once.

    Raises:
        UserError: it has values of its own.
    """
    for name in structure.tied & set(stored.files):
        copies = [other for other in stored.files if other not in structure.tied and structure.shapes[other] == structure.shapes[name]]
        if not any(torch.equal(stored.read(name), stored.read(other)) for other in copies):
            raise UserError(
                f"{folder}: {name} is stored with values of its own, but config.json ties it (tie_word_embeddings); "
                "set tie_word_embeddings to false or remove the tensor"
            )


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
