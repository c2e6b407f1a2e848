"""Path of the codes in a quantized folder.

The codes have a subfolder of their own: vLLM and others load every ``*.safetensors`` next to ``config.json`` and refuse names that are
not weights of the model.
"""

from pathlib import Path

CODES = "quant/codes.safetensors"
"""Path of the codes, relative to the model folder."""
OLD_CODES = "quant.safetensors"
"""Path that older versions used; such folders can still be read."""


def codes_file(folder: Path) -> Path | None:
    """The file with the codes of a model folder; None when the folder has no codes."""
    return next((file for name in (CODES, OLD_CODES) if (file := Path(folder) / name).is_file()), None)
