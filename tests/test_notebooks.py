"""docs/notebooks are programs: valid nbformat 4, without outputs that could be stale, and their cells run in order."""

import ast
import json
import os
from pathlib import Path

import jsonschema
import pytest

from .support.notebook import code_cells
from .support.warm_python import WarmPython

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
TEXT = {"type": "array", "items": {"type": "string"}}
COMMON = {"id": {"type": "string", "pattern": "^[a-zA-Z0-9-_]{1,64}$"}, "metadata": {"type": "object"}, "source": TEXT}
CODE = {"cell_type": {"const": "code"}, "execution_count": {"type": ["integer", "null"]}, "outputs": {"type": "array"}}
NBFORMAT = {
    "type": "object",
    "required": ["metadata", "nbformat", "nbformat_minor", "cells"],
    "additionalProperties": False,
    "properties": {
        "nbformat": {"const": 4},
        "nbformat_minor": {"type": "integer", "minimum": 5},
        "metadata": {
            "type": "object",
            "required": ["kernelspec", "language_info"],
            "properties": {
                "kernelspec": {"type": "object", "required": ["name", "display_name"]},
                "language_info": {"type": "object", "required": ["name"]},
            },
        },
        "cells": {
            "type": "array",
            "items": {
                "oneOf": [
                    {
                        "type": "object",
                        "required": ["id", "cell_type", "metadata", "source"],
                        "additionalProperties": False,
                        "properties": {**COMMON, "cell_type": {"const": "markdown"}},
                    },
                    {
                        "type": "object",
                        "required": ["id", "cell_type", "metadata", "source", "outputs", "execution_count"],
                        "additionalProperties": False,
                        "properties": {**COMMON, **CODE},
                    },
                ]
            },
        },
    },
}
"""What nbformat 4.5 asks of a notebook of Markdown and code, without attachments."""


def test_there_is_a_notebook() -> None:
    assert ROOT / "docs/notebooks/quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_holds_no_output(notebook: Path) -> None:
    found = json.loads(notebook.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(NBFORMAT).validate(found)
    cells = found["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        # every line but the last ends its line, as Jupyter writes them
        assert all(line.endswith("\n") for line in cell["source"][:-1]), cell["id"]
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), f"{cell['id']}: clear the outputs before you commit"
            # plain Python: no magics, no shell
            ast.parse("".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_the_cells_run_in_order(notebook: Path, warm: WarmPython, tmp_path: Path) -> None:
    runner = Path(__file__).with_name("support") / "notebook.py"
    done = warm.run([str(runner), str(notebook)], cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("== cell ")
    assert len(parts) == len(code_cells(notebook)) + 1
    if notebook.name == "quickstart.ipynb":
        told = done.stdout
        assert "01-distill" in parts[2] and "teacher" in parts[2]
        assert "compressed-tensors: " in told and "exact: True" in told
        assert "weights.bits: 99 is out of range" in parts[-1]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("decoct-")] == []
