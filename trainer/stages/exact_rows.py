"""Exact figures of sensitivity that outlive a killed run: a file in the stage's folder, written after each group of modules."""

import json
from collections import UserDict
from pathlib import Path

from ...models.common.files import write_json_atomic


class ExactRows(UserDict[str, list[float]]):
    """First module of a group -> KL in nats per token at each candidate, as a mapping that writes itself to a file.

    Args:
        file: What an earlier start has left is read from it.
        key: The stage's key: figures of other settings, text or model are not taken.
    """

    def __init__(self, file: Path, key: str) -> None:
        self._file, self._key = file, key
        super().__init__()
        if file.is_file():
            left = json.loads(file.read_text(encoding="utf-8"))
            # the floats of JSON are those of Python: a resumed choice is the same to the bit
            self.data = left["rows"] if left["key"] == key else {}

    def __setitem__(self, group: str, losses: list[float]) -> None:
        """Adds the figures of a group and writes the file."""
        super().__setitem__(group, losses)
        write_json_atomic(self._file, {"key": self._key, "rows": self.data})
