"""Opens the source folder of an export as its format needs it: quantized, with plain weights, or either.

Export and verification both open folders here, so that both compare with the same numbers.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...models.common.errors import UserError
from ..codes.state import NoCodesError, QuantState, load_quant_state
from .plain_source import open_plain_source
from .plain_weights import open_any_folder, open_wide_folder
from .quantized_source import ExportSource, Load, open_source

PLAIN_GGUF = {"gguf-f32": torch.float32, "gguf-f16": torch.float16, "gguf-bf16": torch.bfloat16}
"""GGUF formats of plain weights -> dtype to which the weights are rounded."""


class SourceFolder:
    """A folder to export. Its codes are read and proven once for all formats and comparisons."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._state: QuantState | None = None

    def open(self, format: str | None) -> ExportSource:
        """Open the folder as the source of a format; an unknown format or None means a quantized folder.

        Raises:
            UserError: the folder is not of the right kind, or it is damaged.
        """
        # compressed-tensors, GPTQ and AWQ have no entry
        return OPENERS.get(format or "", _open_codes)(self.path, self._load)

    def _load(self, folder: Path) -> QuantState:
        # proving reads every weight, so it is done once for all formats
        if self._state is None:
            self._state = load_quant_state(folder)
        return self._state


def _open_codes(folder: Path, load: Load) -> ExportSource:
    """Call ``open_source``; its refusal of a folder without codes also names the formats that accept one."""
    try:
        return open_source(folder, load)
    except NoCodesError as error:
        plain = ", ".join(("safetensors", "safetensors-f32", *PLAIN_GGUF))
        raise UserError(f"{error} Weights as they are can be exported with --format {plain}.") from error


def _open_plain(folder: Path, load: Load, dtype: torch.dtype) -> ExportSource:
    return open_plain_source(folder, dtype)


OPENERS: dict[str, Callable[[Path, Load], ExportSource]] = {
    "safetensors": open_any_folder,
    "safetensors-f32": open_wide_folder,
    "gguf": _open_codes,
    "gguf-q2_0": _open_codes,
    "gguf-tq1_0": _open_codes,
    **{name: partial(_open_plain, dtype=dtype) for name, dtype in PLAIN_GGUF.items()},
}
"""Format -> opener; every other format takes a quantized folder."""
