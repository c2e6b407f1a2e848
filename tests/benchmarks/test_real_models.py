"""The benchmark of real models: every case is a recipe that decoct takes, and its figures become rows."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from decoct.configs import load_recipe
from decoct.launch.plan.make_plan import plan
from decoct.trainer.tasks.score import TaskScore

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import real_models  # pyright: ignore[reportMissingImports] - a script, found by sys.path


@pytest.fixture
def given(tmp_path: Path) -> argparse.Namespace:
    """The command line with every kind of case."""
    (tmp_path / "text.txt").write_text("words " * 1000)
    return argparse.Namespace(
        bits=[8, 3], groups=[64], systems=list(real_models.SYSTEMS), calibration_tokens="2k", qat_tokens=["4k"], distill_tokens="4k",
        llama_quantize="llama-quantize", peers=[], peer_methods=[], auto_round_steps=1, llama_cpp=None, turns=1,
        calibration=[str(tmp_path / "text.txt")], folder=tmp_path / "work",
    )  # fmt: skip


def test_every_case_is_a_recipe_that_has_a_plan(given: argparse.Namespace, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    ).save_pretrained(teacher)
    cases = real_models.cases(given, layers=4)
    assert len({case.key for case in cases}) == len(cases)
    assert {case.system for case in cases} == {"rtn", "mse", "gptq", "qat 4k", "forward kl", "cross-entropy", "llama.cpp"}
    # 8 bits are not trained
    assert [case.name for case in cases if case.system == "qat 4k"] == ["w3-g64"]
    maker = real_models.Maker(given, teacher)
    for case in cases:
        if case.llama_type:
            continue
        place = tmp_path / case.key
        place.mkdir()
        command = maker._recipe(case, place)
        made = plan(load_recipe(str(place / "case.yaml"), ()))
        assert [stage.kind for stage in made.stages] == [next(iter(stage)) for stage in case.stages]
        assert command[-2:] == ["--out", place]


def test_a_row_has_the_share_that_is_recovered(given: argparse.Namespace) -> None:
    score = TaskScore(
        task="cloze", metric="exact match", score=0.5, stderr=0.1, items=26, shots=0, limit=None, batch=None, seed=0, source="decoct"
    )
    row: dict[str, Any] = {
        "eval": {"perplexity": 10.0, "kl": 0.1, "kl_p99": 1.0, "top1": 0.8},
        "packed_bytes": 100,
        "packed_bits_per_weight": 4.25,
        "tasks": {"cloze": score.row()},
    }
    found = {one.metric: one.value for one in real_models.rows_of("w4-g64", "gptq", row, {"seconds": 3.0, "peak_bytes": 9}, 0.4)}
    assert found == {
        "perplexity": 10.0, "kl": 0.1, "kl_p99": 1.0, "top1": 0.8, "packed_bytes": 100, "packed_bits_per_weight": 4.25,
        "cloze score": 0.5, "cloze stderr": 0.1, "seconds": 3.0, "peak_bytes": 9, "recovered": pytest.approx(0.75),
    }  # fmt: skip


def test_a_file_that_cannot_be_read_is_left_out_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "Q2_K.gguf"
    file.write_bytes(b"GGUF and nothing that belongs there")
    assert not real_models.readable(real_models.Case("Q2_K", "llama.cpp", llama_type="Q2_K"), file)
    assert "Q2_K-llama.cpp is left out: " in capsys.readouterr().err
    # a folder of a recipe or a peer is no GGUF file
    assert real_models.readable(real_models.Case("w4-g64", "rtn", stages=({"quantize": {}},)), tmp_path)


def test_the_seconds_of_a_run_are_those_of_its_stages_alone(tmp_path: Path) -> None:
    rows = [{"kind": "teacher", "seconds": 900.0}, {"kind": "student", "seconds": None}, {"kind": "prune", "seconds": 2.0}]
    (tmp_path / "report.json").write_text(json.dumps({"stages": [*rows, {"kind": "distill", "seconds": 3.0}]}))
    assert real_models.stage_seconds(tmp_path) == 5.0
