"""The quantization benchmark runs, in a form that takes seconds."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ..support.warm_python import WarmPython

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")]

SMALL = """
import quantization
quantization.SIZES["quick"] = quantization.Size(
    bits=(3,), trained_bits=(), once=(3,), windows=32, tokens=8192, rates=(1.0,), turns=1, step_turns=5
)
quantization.interpreter_with = lambda package, peers: None
sys.argv = ["quantization.py", "--quick", "--json", {file!r}]
quantization.main()
"""


def test_it_writes_rows_of_every_method_and_says_which_peers_are_missing(benchmark: Any, warm: WarmPython, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = benchmark(SMALL.format(file=str(file)))
    assert done.returncode == 0, done.stdout + done.stderr
    listed = json.loads(file.read_text())["rows"]
    rows = {(row["case"], row["system"], row["metric"]): row["value"] for row in listed}
    assert rows["full", "full", "kl"] == pytest.approx(0, abs=1e-6) and rows["full", "full", "top1"] == 1
    for system in ("rtn", "mse", "gptq", "qat_ce", "qat_scales_only"):
        for metric in ("perplexity", "kl", "kl_p99", "top1", "seconds", "extra_bytes"):
            assert rows["w3-g64", system, metric] > 0, (system, metric)
    assert rows["w3-g64", "rtn", "recovered"] == 0
    assert rows["w3-g64", "gptq", "recovered"] > 0.5 > rows["w3-g64", "mse", "recovered"] > 0
    assert rows["w3-g64", "qat_scales_only", "kl"] < rows["w3-g64", "rtn", "kl"]
    for system in ("llm-compressor rtn", "llm-compressor gptq", "torchao"):
        assert rows["peers", system, "installed"] == 0
    for objective in ("cross_entropy", "forward_kl"):
        assert rows[f"a step, {objective}", "plain", "seconds_ratio"] == 1.0
        assert 0.5 < rows[f"a step, {objective}", "qat_kl_learned", "seconds_ratio"] < 3
    picture = tmp_path / "picture.svg"
    drawn = warm.run([str(FOLDER / "quantization_picture.py"), str(file), str(picture)], timeout=120)
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_text().count("<use ") > 3  # points and ticks
