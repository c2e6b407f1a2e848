"""A recipe that walks the whole path in seconds, on text made here."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """2,000 sentences of a small grammar: something a tiny model can learn."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ra") for b in ("do", "fi", "gu", "ta")]
    lines = []
    for _ in range(2000):
        first = rng.randrange(len(words))
        lines.append(" ".join(words[(first + 5 * i) % len(words)] for i in range(rng.randrange(4, 12))) + ".")
    folder = tmp_path / "text"
    folder.mkdir()
    for part in range(20):
        (folder / f"{part:02d}.txt").write_text("\n".join(lines[part * 100 : part * 100 + 100]) + "\n")
    return folder


@pytest.fixture
def tiny(corpus: Path) -> dict[str, Any]:
    """The quickstart's path in a tiny form."""
    return {
        "name": "tiny",
        "teacher": {"scratch": {"hidden": 32, "layers": 3, "heads": 2, "kv_heads": 1, "ffn": 64, "vocab": 300, "tokens": "8k"}},
        "student": {"keep": {"layers": 2}},
        "data": {"files": [str(corpus / "*.txt")], "seq_length": 32, "eval_tokens": 1024},
        "stages": [
            {"distill": {"steps": 12}},
            {"prune": {"structured": {"ffn": 32}, "calibration_tokens": 1024}},
            {"distill": {"name": "recover", "steps": 6}},
            {"prune": {"name": "zeros", "magnitude": {"keep": 0.6, "update_every": 2}, "steps": 12}},
            {"qat": {"steps": 12, "weights": {"bits": 4, "group_size": 16}}},
            {"export": {}},
            {"evaluate": {}},
        ],
        "trainer": {"precision": "32", "global_batch_tokens": 512},
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Start `decoct run` on a recipe in a process of its own, in ``tmp_path``."""

    def start(recipe: dict[str, Any], *arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command = [sys.executable, "-m", "decoct.launch.cli", "run", str(file), *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout)

    return start


@pytest.fixture
def read_report(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The report of a run in ``tmp_path``."""

    def read(name: str = "tiny") -> dict[str, Any]:
        return json.loads((tmp_path / "runs" / name / "report.json").read_text())

    return read
