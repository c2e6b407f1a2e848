"""A reader of plain safetensors folders (bf16, fp16 or fp32) as exports: nothing is quantized in them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .tensors import StoredCodes, StoredScheme, StoredTensors, WeightFolder, read_config


class PlainFolder(WeightFolder):
    """An opened folder of plain weights."""

    def __init__(self, folder: Path) -> None:
        """UserError when config, index or a file header is missing, damaged or foreign."""
        self.folder = Path(folder)
        read_config(self.folder)
        self._stored = StoredTensors(self.folder)
        self.modules = ()
        self.plain = self._stored.names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the state dict."""
        return {name: self._stored.shape(name) for name in self.plain}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor's exact value; UserError when it is not a finite bf16, fp16 or fp32 one."""
        return self._stored.floats(name)

    def lattice(self, module: str) -> StoredCodes:
        """There is none."""
        raise UserError(f"{self.folder}: {module} is not quantized")

    def scheme_of(self, module: str) -> StoredScheme:
        """There is none."""
        raise UserError(f"{self.folder}: {module} is not quantized")

    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """None: every linear is plain."""
        return []
