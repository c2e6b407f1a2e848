"""The fresh process loads nothing of decoct but its own file."""

import ast
from pathlib import Path

from decoct.qat.runtimes import transformers_process


def test_runtime_check_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(transformers_process.__file__).read_text())
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert relative == []
    assert not any(module and module.startswith("decoct") for module in named)
