"""Reads the weights of a model folder one by one from memory-mapped files, with checks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..common.errors import UserError
from .folder_checks import checked_places
from .loading import check_finite

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights that can be read without unpacking."""


class WeightFiles:
    """Context manager over the weights of a checked model folder, memory-mapped and read on demand by name.

    Args:
        folder: Local model folder, one safetensors file or several with an index.

    Raises:
        UserError: see ``check_model_folder``.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = Path(folder)
        self._places = checked_places(self.folder)
        # mapped, not read: pages come from disk when a tensor is used, and the kernel may drop them again
        # each file once, however many tensors it holds
        self._open: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in {place.file for place in self._places.values()}}
        self._stored = {name: name for name in self._places}

    def names(self) -> list[str]:
        """Every tensor of the folder, in the order of the files."""
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        """Whether ``name`` is one of ``names()``, without a list of them."""
        return name in self._stored

    def call(self, names: Mapping[str, str | None]) -> None:
        """Rename tensors: name in the file -> new name. A tensor keeps its name in the file if the new one is None or taken."""
        # new name -> name in the file
        called: dict[str, str] = {}
        for stored in self._places:
            # None or an empty name: keep the one in the file
            name = names.get(stored) or stored
            called[stored if name in called else name] = stored
        self._stored = called

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._places[self._stored[name]].info.shape

    def dtype(self, name: str) -> torch.dtype | None:
        """Stored dtype of a tensor; None for dtypes that no model is trained in (integers, 8 bits and fewer)."""
        return DTYPES.get(self._places[self._stored[name]].info.dtype)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor, or rows of its first dimension, to the CPU in its stored dtype. Other rows are not read from disk.

        Args:
            name: One of ``names()``.
            rows: Contiguous rows, possibly none; None = all.

        Raises:
            UserError: the tensor does not exist, or a read value is not finite.
        """
        if name not in self._stored:
            raise UserError(f"{self.folder} has no weight {name}; fetch or export the model again")
        stored = self._stored[name]
        file = self._open[self._places[stored].file]
        # get_slice reads only these rows from the mapped file
        tensor: Tensor = file.get_tensor(stored) if rows is None else file.get_slice(stored)[rows]
        check_finite(self.folder, name, tensor, tensor.dtype)
        return tensor

    def read_as(self, name: str, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """``read`` in another dtype.

        Raises:
            UserError: as ``read``, or a value is too large for ``dtype``.
        """
        stored = self.read(name, rows)
        if stored.dtype == dtype:
            return stored
        tensor = stored.to(dtype)
        # read() has checked the stored values; the cast can overflow to infinity
        check_finite(self.folder, name, tensor, dtype)
        return tensor

    def close(self) -> None:
        """Release the files; tensors that were read stay valid."""
        # safe_open has no close: the mapping ends with its last reference
        self._places.clear()
        self._stored.clear()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_tensor(file: Path, name: str) -> Tensor:
    """Read a tensor of a checked safetensors file in its stored dtype, on the CPU."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
