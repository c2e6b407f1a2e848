"""Parts as a recipe imports them, from the text of a file."""

import textwrap
from pathlib import Path

from decoct.configs.nodes import node_from_python
from decoct.configs.own_parts import OwnParts, load_parts

HEAD = """\
from typing import Annotated, Any, Literal
import torch
from decoct import Bounds, parts
"""


def write_parts(folder: Path, body: str, name: str = "my_parts.py") -> Path:
    """A file that begins with the usual imports (three lines)."""
    file = folder / name
    file.write_text(HEAD + textwrap.dedent(body))
    return file


def parts_of_text(folder: Path, body: str) -> OwnParts:
    """What such a file registers."""
    return load_parts(node_from_python({"import": str(write_parts(folder, body))}), Path())
