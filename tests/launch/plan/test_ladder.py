"""The precision ladder: bare figures as people quote them, and stored ones that add up."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from decoct.launch.plan.ladder import find_shape, kv_cache_bytes, ladder, run_footprint
from decoct.launch.plan.shapes import shape_of
from decoct.models.common.errors import UserError


def test_70b_is_280_140_70_and_35_gigabytes(verb: Any) -> None:
    found = json.loads(verb("footprint", "70B", "--json").stdout)
    assert found["parameters"] == 70_553_706_496
    rows = {row["name"]: row for row in found["rows"]}
    assert [rows[name]["bare"] / 1e9 for name in ("FP32", "BF16", "INT8", "INT4")] == [280, 140, 70, 35]
    # int4 body with a bf16 scale for each 128, bf16 embedding and head
    linears = 70_553_706_496 - 2 * 128_256 * 8192 - 161 * 8192
    assert rows["INT4"]["stored"] == linears // 2 + 2 * linears // 128 + 2 * 2 * 128_256 * 8192 + 2 * 161 * 8192
    assert rows["FP32"]["stored"] == 4 * 70_553_706_496
    # 80 layers x keys and values x 8 heads x 128 x bf16
    assert rows["INT4"]["kv_cache"] == 80 * 2 * 8 * 128 * 2 * 8192


def test_rungs_add_up_and_fall() -> None:
    shape = shape_of(LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000), "")
    rows = ladder(shape, context=100, batch=3)
    assert all(row.stored == row.linears + row.scales + row.embeddings + row.norms for row in rows)
    assert all(row.served == row.stored + kv_cache_bytes(shape, 100, 3) for row in rows)
    by_name = {row.name: row.stored for row in rows}
    assert by_name["FP32"] > by_name["BF16"] > by_name["INT8"] > by_name["INT4, groups of 32"] > by_name["INT4"]
    assert by_name["INT4 with zero points"] > by_name["INT4"] > by_name["INT4, embeddings and head INT8"]


@pytest.mark.parametrize(
    ("context", "batch", "expected"),
    [
        (None, "0", "--batch=0 must be a whole number of at least 1, such as 8"),
        ("1.5", "1", "--context=1.5 must be a whole number of at least 1, such as 32768 or 32k"),
    ],
)
def test_a_count_that_is_none_is_refused_with_an_example(context: str | None, batch: str, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        run_footprint("SmolLM2-360M", context, batch, as_json=False)
    assert str(refused.value) == expected


def test_a_folder_is_read_and_an_unknown_size_is_refused(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=100).save_pretrained(tmp_path)
    assert find_shape(str(tmp_path)).hidden == 64
    assert find_shape("HuggingFaceTB/SmolLM2-1.7B").parameters == 1_711_376_384
    with pytest.raises(UserError, match=r"no stored architecture has about 12B parameters.*Qwen3-8B \(8.19B\)"):
        find_shape("12B")
    with pytest.raises(UserError, match=r"'0B': .*give the path of a model folder"):
        find_shape("0B")


def test_what_is_not_rounded_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128).save_pretrained(tmp_path / "gpt2")
    run_footprint(str(tmp_path / "gpt2"), None, "1", False)
    assert "0.0% of the decoder's weights are in linears, which are rounded; 100% Conv1D layers" in capsys.readouterr().out
    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path / "llama")
    run_footprint(str(tmp_path / "llama"), None, "1", False)
    assert "which are rounded" not in capsys.readouterr().out
