"""The tensors of a model folder under the names that transformers writes, whatever names the folder uses."""

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
    """The files, shapes and names of a folder's tensors."""

    files: dict[str, Path]
    """Tensor name -> its file, in file order."""
    shapes: dict[str, tuple[int, ...]]
    other_names: dict[str, str]
    """Tensor name -> its name in the file, where that differs."""
    left_out: dict[str, int]
    """Part of the model -> number of its tensors that transformers does not load; tensors that it computes itself do not count."""

    def record(self, folder: Path) -> dict[str, Any]:
        """Return the folder's ``decoct.json`` with a note on tensors that are left out."""
        return read_record(folder) | ({"left_out": self.left_out} if self.left_out else {})

    def read(self, name: str) -> Tensor:
        """Return a tensor as stored."""
        return read_tensor(self.files[name], self.other_names.get(name, name))


def stored_files(found: dict[str, TensorPlace], structure: Structure) -> StoredFiles:
    """Convert ``checked_places`` to the names of ``structure``, without the tensors that transformers does not load."""
    left_out: dict[str, int] = {}
    if structure.model is not None and not found.keys() <= structure.shapes.keys():
        left_out = summary(not_loaded(structure.model, found))
        # buffers that transformers computes itself are no loss, and are not counted in ``left_out``
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
    """Check that a tied weight stored under a second name repeats the first; the export stores it once.

    Raises:
        UserError: the second copy has different values.
    """
    for name in structure.tied & set(stored.files):
        # one of equal shape must have equal values: which one a tie points to is not recorded
        copies = [other for other in stored.files if other not in structure.tied and structure.shapes[other] == structure.shapes[name]]
        if not any(torch.equal(stored.read(name), stored.read(other)) for other in copies):
            raise UserError(
                f"{folder}: {name} is stored with values of its own, but config.json ties it (tie_word_embeddings); "
                "set tie_word_embeddings to false or remove the tensor"
            )
