"""Writes recipe files for the user: a copy of a shipped recipe, and the JSON Schema that editors check it with."""

import json
from pathlib import Path

from ...models.common.errors import UserError

SCHEMA_NAME = "recipe.schema.json"
"""File name of the schema next to a copied recipe. The recipe's first line names it."""


def copy_recipe(name: str, target: Path) -> Path:
    """Write a shipped recipe to ``target``, with the schema of its own folder in the first line.

    Raises:
        UserError: the file exists or cannot be written.
    """
    from ...configs.shipped import shipped_text, with_schema

    text = with_schema(shipped_text(name), SCHEMA_NAME)
    try:
        # "x" checks and creates in one call, so that a file which appears meanwhile is not overwritten either
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{target} exists; choose another name: decoct recipes copy {name} FILE") from None
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another place") from None
    return target


def write_schema(target: Path) -> Path:
    """Write the JSON Schema of recipes; an existing schema of recipes is replaced.

    Raises:
        UserError: another file of that name exists, or the place cannot be written.
    """
    from ...configs.shipped import SCHEMA_FILE

    text = SCHEMA_FILE.read_text(encoding="utf-8")
    # only a schema is replaced, as that of an earlier version; the name may belong to another file
    if target.exists() and not _is_schema(target, json.loads(text)["title"]):
        raise UserError(f"{target} exists and is not a schema of recipes; choose another name: decoct recipes schema --out FILE")
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another place") from None
    return target


def _is_schema(file: Path, title: str) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("title") == title
