"""Checks the types of what the functions are given, so that a slip gets a message and no TypeError."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError

_MODEL = "a model folder, .gguf file or hub id, or the result of another function"


def as_path(value: Any, name: str, wanted: str) -> str:
    """Return a path as text.

    Args:
        value: What was given.
        name: Name of the argument.
        wanted: What it takes, in words.

    Raises:
        UserError: ``value`` is neither text nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name}={value!r} is of the type {type(value).__name__}; give {wanted}")
    return str(os.fspath(value))


def as_model(value: Any, name: str) -> str:
    """Return a model as text; UserError if it can be none."""
    return as_path(value, name, _MODEL)


def as_out(value: Any) -> Path | None:
    """Return the folder to write, None for the default; UserError if it is no path."""
    return None if value is None else Path(as_path(value, "out", "a folder"))


def as_files(value: Any) -> list[str] | None:
    """Return the files of a text, None for the default; UserError if they are no files."""
    if value is None:
        return None
    wanted = "a file, a glob, a list of them, or a dict as the recipe's section data"
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return [as_path(value, "data", wanted)]
    return [as_path(file, f"data[{index}]", "a file or a glob") for index, file in enumerate(value)]
