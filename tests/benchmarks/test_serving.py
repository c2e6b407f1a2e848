"""The benchmark of serving runs, says what is missing, and times nothing that is wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")]

SMALL = """
import serving
import serving_student
serving.LAYERS["quick"], serving.WIDER["quick"], serving_student.STEPS = 1, 2, 50
serving.SYSTEMS = {{"transformers": "transformers", "llama.cpp": "no_such_package", "vllm": "nor_this_one"}}
{more}
sys.argv = ["serving.py", "--quick", "--json", {file!r}, "--peers", sys.executable, "--threads", "1"]
serving.main()
"""
SAME_FUNCTION = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import serving_student
config = LlamaConfig(vocab_size=50, num_hidden_layers=2, **{**serving_student.SHAPE, "hidden_size": 32, "intermediate_size": 48})
model = LlamaForCausalLM(config).eval()
wide = serving_student.widened(model, 4)
tokens = torch.arange(40)[None]
with torch.inference_mode():
    expected, found = model(tokens).logits, wide(tokens).logits
assert sum(p.numel() for p in wide.parameters()) > 8 * sum(p.numel() for p in model.parameters())
assert (expected - found).abs().max() <= 1e-5 * expected.abs().max(), (expected - found).abs().max()
"""


def test_widening_keeps_the_function(benchmark: Any) -> None:
    done = benchmark(SAME_FUNCTION)
    assert done.returncode == 0, done.stderr


def test_it_writes_rows_of_speed_and_memory_and_of_what_is_missing(benchmark: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = benchmark(SMALL.format(file=str(file), more=""))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bf16-folder in transformers: loads it and agrees" in done.stderr
    rows = {(row["case"], row["system"], row["metric"]): row["value"] for row in json.loads(file.read_text())["rows"]}
    for case in ("bf16", "w4-g32"):
        assert rows[case, "transformers", "tokens_per_second"] > 0
        assert rows[case, "transformers", "peak_bytes"] > 10**8
        assert rows[case, "llama.cpp", "installed"] == rows[case, "vllm", "installed"] == 0
    assert 0 < rows["w4-g32", "transformers", "bytes"] < 0.7 * rows["bf16", "transformers", "bytes"]


WRONG = """
import decoct.qat.runtimes.reference as runtimes
load = runtimes.load_exported_model
def other(path, **options):
    model = load(path, **options)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.roll(32, 0)
    return model
runtimes.load_exported_model = other
"""


def test_it_times_nothing_that_is_wrong(benchmark: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = benchmark(SMALL.format(file=str(file), more=WRONG))
    assert done.returncode != 0
    assert "transformers does not serve what was trained" in done.stderr
    assert not file.exists()
