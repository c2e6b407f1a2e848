"""The tensors of a model folder under the names that transformers writes, whatever the folder calls them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.folder.model_folder import read_record
from ...models.folder.stored_names import ignored, not_loaded, summary
from ...models.folder.structure import Structure
from ...models.folder.tensor_places import TensorPlace
from ...models.folder.weights import read_tensor


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


def stored_files(found: dict[str, TensorPlace], structure: Structure) -> StoredFiles:
    """``checked_places`` as the model of ``structure`` has them; tensors that transformers leaves out are left out."""
    left_out: dict[str, int] = {}
    if structure.model is not None and not found.keys() <= structure.shapes.keys():
        left_out = summary(not_loaded(structure.model, found))
        outside = set(ignored(structure.model, found))
        found = {name: place for name, place in found.items() if name not in outside}
    names = structure.in_files(found)
    return StoredFiles(
        files={names[name]: place.file for name, place in found.items()},
        shapes={names[name]: place.info.shape for name, place in found.items()},
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
