"""Opens the independent reader of an export by its format. A reader shares no code with the writer."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from ...models.folder.model_folder import read_record
from .awq import AwqFolder
from .bitsandbytes import BitsandbytesFolder
from .compressed_tensors import PackedFolder, is_packed
from .gguf_model import GgufModel, find_gguf
from .gptq import GptqFolder
from .plain import PlainFolder
from .tensors import Decoded, WeightFolder, read_config


class ExportReader(Protocol):
    """The interface of every reader. Names are those of transformers."""

    modules: tuple[str, ...]
    """Modules whose weights are stored as codes and scales."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state dict; tied tensors appear once."""
        ...

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor as fp32: codes times scales, or the exact stored values."""
        ...

    def as_stored(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The result of ``tensor`` if the tensor ``name`` of the source has ``values``: the same, unless the format shifts them."""
        ...

    def decode(self, module: str) -> Decoded:
        """Weight (as from ``tensor``), codes and scales of a quantized module."""
        ...


def open_export(path: Path) -> ExportReader:
    """The reader for a folder or file.

    Raises:
        UserError: it is not an export that a reader knows, or it is damaged.
    """
    return GgufModel(path) if find_gguf(path) is not None else open_folder(path)


def open_folder(path: Path) -> WeightFolder:
    """The reader for a folder of safetensors, by ``quant_method`` of its config.

    Raises:
        UserError: config, index or a file header is missing or damaged, or no reader knows the method in the config.
    """
    path = Path(path)
    config = read_config(path)
    # plain weights: a model folder, quantized or not, or a plain export
    if "quantization_config" not in config:
        return PlainFolder(path)
    quantization = config["quantization_config"]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    readers = {"compressed-tensors": PackedFolder, "gptq": GptqFolder, "awq": AwqFolder, "bitsandbytes": BitsandbytesFolder}
    if not isinstance(method, str) or method not in readers:
        raise UserError(f"{path / 'config.json'}: quant_method is {method!r:.100}; decoct reads {', '.join(readers)}")
    return readers[method](path)


def is_export(path: Path) -> bool:
    """Whether a folder or file is an export and not a model folder; UserError if config.json is missing or damaged."""
    return find_gguf(path) is not None or is_packed(path) or "export" in read_record(path)
