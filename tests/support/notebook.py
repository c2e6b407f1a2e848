"""Runs the code cells of a notebook in order, in one namespace, as Jupyter would: ``python notebook.py FILE``. Cells are plain Python."""

import json
import sys
from pathlib import Path
from typing import Any


def code_cells(notebook: Path) -> list[str]:
    """The source of each code cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def main(notebook: Path) -> None:
    """Run the cells; a line before each says which one it is."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(notebook), 1):
        print(f"== cell {number}", flush=True)
        exec(compile(source, f"{notebook.name}, cell {number}", "exec"), scope)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
