"""decoct: distil, prune, quantize, export and report large language models. Its parts are its sub-packages; importing it costs nothing."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

__version__ = "0.1.0"


def lazy_names(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that hands on names of its modules (PEP 562).

    The names are those that the package's ``__init__.py`` imports under ``if TYPE_CHECKING:``. A type checker reads them there; at run
    time each is imported when it is first asked for. So a package costs nothing to import, and ``decoct.qat.spec`` needs no torch.
    """

    def places() -> dict[str, str]:
        tree = ast.parse(Path(str(sys.modules[package].__file__)).read_text(encoding="utf-8"))
        blocks = (node for node in tree.body if isinstance(node, ast.If))
        imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
        return {alias.name: f"{package}.{node.module}" for node in imports for alias in node.names}

    def get(name: str) -> object:
        place = None if name.startswith("__") else places().get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(place), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places()})

    return get, names
