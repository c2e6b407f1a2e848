"""The benchmark of fake quantization runs where there is no GPU, and stops when the thing it times is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from ..support.warm_python import WarmPython

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fake_quant.py"
pytestmark = pytest.mark.slow
WRONG = """
import runpy, sys, torch
sys.argv = ["fake_quant.py", "--quick"]
import decoct.qat.fake_quant as package
own = package.fake_quant
package.fake_quant = lambda w, spec, backend="auto": own(w, spec) * (1.0 if backend == "reference" else 1.001)
runpy.run_path({script!r}, run_name="__main__")
"""


def test_quick_writes_its_rows(warm: WarmPython, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = warm.run([str(SCRIPT), "--quick", "--json", str(file)])
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(file.read_text())
    found = {row["system"]: row["value"] for row in written["rows"] if row["case"] == "256x512-g128" and row["metric"] == "seconds_ratio"}
    assert {"decoct", "decoct learned", "dense"} <= found.keys()
    assert found["dense"] == 1.0
    assert any(row["case"].startswith("a step") for row in written["rows"])


def test_wrong_values_are_not_timed(benchmark: Any) -> None:
    done = benchmark(WRONG.format(script=str(SCRIPT)))
    assert done.returncode == 1
    assert "what they cost means nothing" in done.stderr
