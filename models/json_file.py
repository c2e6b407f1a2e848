"""JSON objects of files that people hand us."""

import json
from pathlib import Path
from typing import Any

from .errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; ``UserError`` when the file is missing or holds something else."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not a model folder: it has no {path.name}; give a folder that from_pretrained can read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}; fetch or export the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; fetch or export the model again")
    return content
