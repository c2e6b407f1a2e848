"""The distillation benchmark runs, in a form that takes seconds."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")]

SMALL = """
distillation.TOKENS["quick"] = 16_384
distillation.TURNS = 5
distillation.SYSTEMS = ("cross_entropy", "cache_hybrid")
sys.argv = ["distillation.py", "--quick", "--json", {file!r}]
distillation.main()
"""


def test_it_writes_rows_of_quality_speed_memory_and_steps(benchmark: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = benchmark(SMALL.format(file=str(file)))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["case"], row["system"], row["metric"]): row["value"] for row in json.loads(file.read_text())["rows"]}
    for system in ("cross_entropy", "cache_hybrid"):
        for metric in ("perplexity", "kl", "top1", "tokens_per_second", "extra_bytes"):
            assert rows["quickstart", system, metric] > 0
    assert rows["quickstart", "cache_hybrid", "kl"] < rows["quickstart", "cross_entropy", "kl"]
    assert rows["a step", "cross_entropy", "seconds_ratio"] == 1.0
    # a step from the cache runs no teacher; the exact ratio is the benchmark's to measure, on an idle machine
    assert rows["a step", "cache_hybrid", "seconds_ratio"] < rows["a step", "forward_kl", "seconds_ratio"]
