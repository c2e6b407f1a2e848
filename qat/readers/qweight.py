"""The common part of GPTQ and AWQ folders: each quantized module has ``qweight``, ``qzeros`` and ``scales``, and no others may exist."""

from abc import abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .tensors import StoredScheme, StoredTensors, WeightFolder

QWEIGHT, QZEROS, SCALES = ".qweight", ".qzeros", ".scales"


class QweightFolder(WeightFolder):
    """An opened folder of such modules.

    Args:
        folder: Folder with safetensors files.
        optional: Suffixes of further tensors that a module may have.

    Raises:
        UserError: an index or a file header is damaged, a module's tensors are incomplete or stored twice, or one belongs to no module.
    """

    def __init__(self, folder: Path, optional: tuple[str, ...] = ()) -> None:
        self.folder = Path(folder)
        self._stored = StoredTensors(self.folder)
        names = self._stored.names
        self.modules = tuple(name.removesuffix(QWEIGHT) for name in names if name.endswith(QWEIGHT))
        needed = {module + suffix for module in self.modules for suffix in (QWEIGHT, QZEROS, SCALES)}
        # with the tensors that a module may have; everything else is a plain tensor
        parts = needed | {module + suffix for module in self.modules for suffix in optional}
        self.plain = tuple(name for name in names if name not in parts)
        for name in sorted(needed - set(names)):
            raise UserError(f"{self.folder}: {name} is missing; the export is incomplete")
        for name in self.plain:
            if name.endswith((QZEROS, SCALES, *optional)):
                raise UserError(f"{self._stored.file(name)}: {name} belongs to no {QWEIGHT[1:]}; the export is incomplete")
            # runtimes would differ in which of the two they use
            if name.removesuffix(".weight") + QWEIGHT in parts:
                raise UserError(f"{self._stored.file(name)}: {name} is stored twice, packed and plain; export again")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state dict, under original names."""
        packed = {f"{module}.weight": self._shape(module) for module in self.modules}
        return packed | {name: self._stored.shape(name) for name in self.plain}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The fp32 tensor ``name`` of the full state dict.

        Raises: UserError as ``stored_codes``, or if a plain tensor is not float or not finite.
        """
        # a packed weight has no tensor of its own name
        return self._stored.floats(name) if name in self._stored else self.stored_codes(name.removesuffix(".weight")).weight()

    @abstractmethod
    def _shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a packed module."""

    def _group_width(self, module: str, columns: int, scheme: StoredScheme) -> int:
        """Inputs per scale; UserError if the group size of the config does not divide the inputs."""
        # None: one group of all inputs
        width = scheme.group_size or columns
        if not width or columns % width:
            raise UserError(f"{self._stored.file(module + QWEIGHT)}: {module}: group_size {width} does not divide its {columns} inputs")
        return width
