"""The fresh process loads nothing of decoct but its own file."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from decoct.qat.runtimes import transformers_process


def test_runtime_check_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(transformers_process.__file__).read_text())
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert relative == []
    assert not any(module and module.startswith("decoct") for module in named)


@pytest.mark.parametrize(("words", "said"), [("", "ImportError"), ("\n", "ImportError"), ("no optimum\nmore", "no optimum")])
def test_a_missing_package_is_named_by_what_its_error_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str) -> None:
    def missing(*_: object) -> None:
        raise ImportError(words)

    monkeypatch.setattr(transformers_process, "run_transformers", missing)
    np.save(tmp_path / "tokens.npy", np.zeros((1, 2), np.int64))
    places = [part for name in ("tokens", "seen", "result") for part in (f"--{name}", str(tmp_path / f"{name}.npy"))]
    transformers_process.main(["folder", *places])
    assert json.loads((tmp_path / "result.npy").read_text()) == {"phase": "loading", "not_installed": said}
