"""The quantization benchmark runs, in a form that takes a minute or two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")]

SMALL = """
import sys
sys.path.insert(0, {folder!r})
import quantization
quantization.SIZES["quick"] = quantization.Size(bits=(3,), trained_bits=(), once=(3,), windows=32, tokens=8192, rates=(1.0,), turns=1)
quantization.interpreter_with = lambda package, peers: None
sys.argv = ["quantization.py", "--quick", "--json", {file!r}]
quantization.main()
"""


def test_it_writes_rows_of_every_method_and_says_which_peers_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    script = SMALL.format(folder=str(FOLDER), file=str(file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=850)
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
    subprocess.run([sys.executable, str(FOLDER / "quantization_picture.py"), str(file), str(picture)], check=True, timeout=120)
    assert picture.read_text().count("<use ") > 3  # points and ticks
