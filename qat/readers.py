"""The independent reader of an export, whatever its format."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .read_compressed_tensors import PackedFolder, is_packed
from .read_gguf_model import GgufModel, find_gguf


class ExportReader(Protocol):
    """What every reader can do. Names are transformers'."""

    modules: tuple[str, ...]
    """Modules whose weights are stored as codes and scales."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state dict; tied tensors once."""
        ...

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor as fp32: codes times scales, or the exact stored value."""
        ...

    def as_stored(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What ``tensor`` gives when the tensor ``name`` of the source holds ``values``: the same, unless the format shifts them."""
        ...

    def codes_and_scales(self, module: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """(codes [out, in], scales [out, groups]); in / groups may be a part of the group that was trained."""
        ...


def open_export(path: Path) -> ExportReader:
    """The reader that fits a folder or file.

    Raises:
        UserError: it is no export that a reader knows, or damaged.
    """
    return GgufModel(path) if find_gguf(path) is not None else PackedFolder(path)


def is_export(path: Path) -> bool:
    """Whether a folder or file holds an export, rather than plain safetensors; UserError when config.json is missing or broken."""
    return find_gguf(path) is not None or is_packed(path)
