"""The independent reader of an export, by what its config says it is.

A reader shares no code with the writer. All of them give the same view: names, shapes, every tensor as fp32, and of a quantized
module its lattice.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..models.errors import UserError
from .read_awq import AwqFolder
from .read_compressed_tensors import PackedFolder
from .read_gptq import GptqFolder
from .read_tensors import Lattice, Scheme, StoredTensors, read_config


class ExportReader(Protocol):
    """An opened export. Every access reads the file anew; nothing is kept."""

    @property
    def format(self) -> str:
        """The format's name, as ``EXPORTERS`` has it."""
        ...

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the quantized modules, in file order."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state dict, under original names."""
        ...

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor of the full state dict; UserError when it is damaged."""
        ...

    def lattice(self, module: str) -> Lattice:
        """Codes, scales and zero points of a quantized module; UserError when they are damaged."""
        ...

    def scheme_of(self, module: str) -> Scheme:
        """What the config says of a quantized module."""
        ...

    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """Sentences about linears that are plain or packed against what the config says of them."""
        ...


class PlainFolder:
    """A folder of plain weights as an export: nothing is quantized in it."""

    format = "safetensors"
    modules: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        """UserError when config, index or a file header is missing, damaged or foreign."""
        self.folder = Path(folder)
        read_config(self.folder)
        self._stored = StoredTensors(self.folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the state dict."""
        return {name: self._stored.shape(name) for name in self._stored.names}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor's exact value; UserError when it is not a finite bf16, fp16 or fp32 one."""
        return self._stored.floats(name)

    def lattice(self, module: str) -> Lattice:
        """There is none."""
        raise UserError(f"{self.folder}: {module} is not quantized")

    def scheme_of(self, module: str) -> Scheme:
        """There is none."""
        raise UserError(f"{self.folder}: {module} is not quantized")

    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """None: every linear is plain."""
        return []


def open_export(folder: Path) -> ExportReader:
    """Open a folder with the reader of its format.

    Raises:
        UserError: config, index or a file header is missing or damaged, or no reader knows what the config names.
    """
    folder = Path(folder)
    config = read_config(folder)
    if "quantization_config" not in config:
        return PlainFolder(folder)
    quantization = config["quantization_config"]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    readers = {"compressed-tensors": PackedFolder, "gptq": GptqFolder, "awq": AwqFolder}
    if not isinstance(method, str) or method not in readers:
        raise UserError(f"{folder / 'config.json'}: quant_method is {method!r:.100}; decoct reads {', '.join(readers)}")
    return readers[method](folder)
