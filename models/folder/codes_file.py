"""Where the codes of a quantized folder lie.

They are in a folder of their own: vLLM and others load every ``*.safetensors`` that lies beside ``config.json`` and refuse names that are
no weights of the model.
"""

from pathlib import Path

CODES = "quant/codes.safetensors"
"""Place of the codes inside a model folder."""
OLD_CODES = "quant.safetensors"
"""Where older versions put them, beside the weights; such folders are still read."""


def codes_file(folder: Path) -> Path | None:
    """The file with the codes of a model folder; None when it has none."""
    return next((file for name in (CODES, OLD_CODES) if (file := Path(folder) / name).is_file()), None)
