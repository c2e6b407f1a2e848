"""The benchmark of linear_divergence runs, and the memory it promises holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "linear_divergence.py"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")]


def run(*arguments: str) -> str:
    # as the benchmark starts its own processes: large blocks go back to the system when they are freed, whatever the heap's history
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_memory_beyond_inputs_weights_and_gradients_is_an_eighth_of_the_dense_forms() -> None:
    dense, own = (float(run("--memory", json.dumps([2048, 512, 32_000, name])).splitlines()[-1]) for name in ("dense", "decoct"))
    assert dense > 4 * 2048 * 32_000 * 4
    assert own <= dense / 8


def test_quick_writes_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    run("--quick", "--json", str(file))
    written = json.loads(file.read_text())
    found = {(row["system"], row["metric"]) for row in written["rows"]}
    assert {(s, m) for s in ("dense", "decoct") for m in ("seconds_ratio", "extra_bytes")} <= found
    assert written["versions"]["packages"]["torch"]
