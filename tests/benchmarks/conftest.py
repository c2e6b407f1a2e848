"""Benchmark scripts that run as their own selves, with less work: the rows and messages are the subject, not the figures."""

import email
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.warm_python import WarmPython

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL_RECIPE = """
import sys
sys.path.insert(0, {folder!r})
import distillation

def recipe(texts, size, whole=distillation.recipe):
    # half a megabyte of text in place of all modules of Python, and a teacher that learns it in seconds
    given = whole(texts, size)
    given["teacher"]["scratch"] |= dict(hidden=64, heads=2, ffn=192, vocab=512, tokens=65_536)
    given["data"] = dict(files={texts!r}, seq_length=distillation.SEQ, eval_tokens=8192)
    return given

distillation.recipe = recipe
"""
"""What a script of ``benchmark`` begins with: the benchmarks are importable, and those that make a recipe make a small one."""


@pytest.fixture
def benchmark(warm: WarmPython, tmp_path: Path) -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    """``benchmark(text)``: run this text as a script, with the benchmarks importable and ``distillation.recipe`` a small one."""

    def run(text: str) -> "subprocess.CompletedProcess[str]":
        folder = tmp_path / "text"
        folder.mkdir()
        for module in Path(email.__file__).parent.glob("*.py"):
            (folder / f"{module.stem}.txt").write_text(module.read_text())
        script = tmp_path / "script.py"
        script.write_text(SMALL_RECIPE.format(folder=str(FOLDER), texts=[str(folder / "*.txt")]) + text)
        return warm.run([str(script)], cwd=tmp_path, timeout=600)

    return run
