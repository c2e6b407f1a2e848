"""The benchmark of pruning's scores: a second shape is found without the text, and so in less than a forward pass."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..support.pruned_families import CONFIGS


def test_a_second_shape_costs_less_than_a_pass(benchmark: Any, tmp_path: Path) -> None:
    small = {**CONFIGS["llama"], "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
    AutoConfig.for_model("llama", vocab_size=64, **small).save_pretrained(tmp_path / "config")
    script = f"""
import sys, pruning_scores
sys.argv = ["x", "--config", {str(tmp_path / "config")!r}, "--tokens", "2k", "--seq-length", "32", "--json", "rows.json"]
pruning_scores.main()
"""
    done = benchmark(script)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    shares = {row["system"]: row["value"] for row in rows if row["metric"] == "share"}
    assert shares["forward pass"] == 1
    assert shares["another shape, from kept scores"] < 1 < shares["scores of all axes"]
    assert "192, 1,984 tokens" in rows[0]["case"]
