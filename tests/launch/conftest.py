"""A recipe that walks the whole path in seconds, on text made here."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..support.warm_python import WarmPython

Run = Callable[..., subprocess.CompletedProcess[str]]
Verb = Callable[..., subprocess.CompletedProcess[str]]
DECOCT = ["-m", "decoct.launch.cli"]
_SCRATCH = {"hidden": 32, "layers": 3, "heads": 2, "kv_heads": 1, "ffn": 64, "vocab": 300, "tokens": "8k"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """2,000 sentences of a small grammar: something a tiny model can learn."""
    return _write_corpus(tmp_path / "text")


def _write_corpus(folder: Path) -> Path:
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ra") for b in ("do", "fi", "gu", "ta")]
    lines = []
    for _ in range(2000):
        first = rng.randrange(len(words))
        lines.append(" ".join(words[(first + 5 * i) % len(words)] for i in range(rng.randrange(4, 12))) + ".")
    folder.mkdir()
    for part in range(20):
        (folder / f"{part:02d}.txt").write_text("\n".join(lines[part * 100 : part * 100 + 100]) + "\n")
    return folder


@pytest.fixture
def tiny(corpus: Path) -> dict[str, Any]:
    """The quickstart's path in a tiny form."""
    return _tiny(corpus)


def _tiny(corpus: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "teacher": {"scratch": dict(_SCRATCH)},
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


@pytest.fixture(scope="session")
def made(warm: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ``tiny`` that distils for one step: its ``cache`` and ``runs``."""
    folder = tmp_path_factory.mktemp("made")
    _write_corpus(folder / "text")
    recipe = {**_tiny(folder / "text"), "stages": [{"distill": {"steps": 1}}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = warm.run([*DECOCT, "run", "recipe.yaml"], cwd=folder, env={**os.environ, "DECOCT_CACHE": str(folder / "cache")})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def small_student(made: Path) -> Path:
    """A model folder that nobody may change: a student of ``tiny`` after one step."""
    return made / "runs/tiny/01-distill/model"


@pytest.fixture
def verb(warm: WarmPython, tmp_path: Path) -> Verb:
    """``verb(*arguments, code=0, ranks=1, timeout=300, **environment)``: `decoct` in a process of its own, in ``tmp_path``.

    Its exit code must be ``code``; None = any. With several ``ranks`` it is that many processes that train together, and rank 0 answers.
    """

    def start(
        *arguments: str, code: int | None = 0, ranks: int = 1, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **environment}
        if ranks > 1:
            done, *others = warm.run_ranks(ranks, [*DECOCT, *arguments], cwd=tmp_path, env=env, timeout=timeout)
            assert {other.returncode for other in others} == {done.returncode}, done.stderr + "".join(other.stderr for other in others)
        else:
            done = warm.run([*DECOCT, *arguments], cwd=tmp_path, env=env, timeout=timeout)
        assert code in (None, done.returncode), done.stdout + done.stderr
        return done

    return start


@pytest.fixture
def run(verb: Verb, request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """`decoct run` on a recipe, as ``verb`` with any exit code. A recipe with the teacher of ``tiny`` finds it in its cache."""

    def start(recipe: dict[str, Any], *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        cached = Path(os.environ["DECOCT_CACHE"], "teachers")
        if recipe.get("teacher", {}).get("scratch") == _SCRATCH and not cached.exists():
            shutil.copytree(request.getfixturevalue("made") / "cache/teachers", cached)
        return verb("run", str(file), *arguments, **{"code": None, **options})

    return start


@pytest.fixture
def read_report(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The report of a run in ``tmp_path``."""

    def read(name: str = "tiny") -> dict[str, Any]:
        return json.loads((tmp_path / "runs" / name / "report.json").read_text())

    return read
