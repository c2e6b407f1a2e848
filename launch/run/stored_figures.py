"""Figures of a model that a run has measured once, in a file of the run folder with the key of what they depend on."""

import json
from pathlib import Path
from typing import Any

from ...models.common.files import write_json_atomic
from ...models.common.seal import seal_is_broken, sealed


def read_figures(file: Path) -> dict[str, Any]:
    """Return the stored ``key`` and ``row``; {} if there are none or the file is damaged, so that they are measured again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and not seal_is_broken(found) else {}


def store_figures(file: Path, key: str, row: dict[str, Any]) -> None:
    """Write ``row`` under ``key``; a checksum reveals damage."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, sealed({"key": key, "row": row}))
