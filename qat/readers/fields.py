"""Checks of the fields of a ``quantization_config``, which another tool may have written."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from .tensors import read_config

BITS = (2, 3, 4, 5, 6, 7, 8)


def read_quantization(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(config.json, its ``quantization_config``) of an export.

    Raises:
        UserError: the folder holds plain weights, or its config cannot be read.
    """
    file, quantization = Path(folder) / "config.json", read_config(folder).get("quantization_config")
    if not isinstance(quantization, dict):
        raise UserError(f"{file} has no quantization_config: the folder holds plain weights; run 'decoct export' on a quantized folder")
    return file, quantization


def check_fields(file: Path, expected: Sequence[tuple[str, Any, tuple[Any, ...]]]) -> None:
    """Raises UserError for the first (field, value, allowed values) whose value is not allowed; types must be equal too."""
    for name, value, allowed in expected:
        # types too, because 1 == True in Python
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"{file}: quantization_config: {name} is {value!r:.100}; this reader knows {choices}")


def check_group(file: Path, size: Any) -> None:
    """Raises UserError if a group size is neither -1 (one scale per row) nor a positive whole number."""
    if type(size) is not int or (size != -1 and size < 1):
        raise UserError(f"{file}: quantization_config: group_size is {size!r:.100}; it must be -1 or a positive whole number")


def check_module_names(file: Path, key: str, names: Any) -> tuple[str, ...]:
    """Returns a list of non-empty strings as a tuple; raises UserError for anything else."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{file}: quantization_config.{key} must be a list of module names")
    return tuple(names)


def module_pattern(file: Path, key: str, text: str) -> re.Pattern[str]:
    """Compiles a regular expression of module names.

    Raises:
        UserError: the pattern is invalid, or could backtrack without bound (more than three repeats, or a repeated group).
    """
    # patterns of module names need few repeats and no repeated group
    if len(text) > 500 or re.search(r"[*+{})][*+{]", text) or len(re.findall(r"[*+{]", text)) > 3:
        raise UserError(f"{file}: quantization_config.{key}: {text!r:.100} is not a pattern of module names that this reader takes")
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: quantization_config.{key}: {text!r:.100} is not a regular expression ({error})") from error
