"""A reader of unquantized safetensors folders (bf16, fp16 or fp32) as exports."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .tensors import StoredCodes, StoredScheme, StoredTensors, WeightFolder, read_config


class PlainFolder(WeightFolder):
    """An opened folder of plain weights."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if config, index or a file header is missing, damaged or foreign."""
        self.folder = Path(folder)
        # read for its errors alone: a folder without a sound config is no export
        read_config(self.folder)
        self._stored = StoredTensors(self.folder)
        self.modules = ()
        self.plain = self._stored.names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the state dict."""
        return {name: self._stored.shape(name) for name in self.plain}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor's exact values; UserError if it is not bf16, fp16 or fp32, or not finite."""
        return self._stored.floats(name)

    def stored_codes(self, module: str) -> StoredCodes:
        """Always raises UserError: no module is quantized."""
        raise UserError(f"{self.folder}: {module} is not quantized")

    def scheme_of(self, module: str) -> StoredScheme:
        """Always raises UserError: no module is quantized."""
        raise UserError(f"{self.folder}: {module} is not quantized")

    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """Returns an empty list: no linear is packed."""
        return []
