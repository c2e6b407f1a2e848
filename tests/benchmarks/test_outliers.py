"""The benchmark of planted outliers: the planted model is the same function with uneven inputs, and every system has its rows."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import outliers  # pyright: ignore[reportMissingImports] - a script, found by sys.path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=96, initializer_range=0.2, tie_word_embeddings=True)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("outliers") / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ids = torch.randint(96, (8, 16), generator=torch.Generator().manual_seed(1))
    return outliers.Case(str(folder), ids[:4], ids[4:])


@torch.no_grad()
def test_the_planted_model_is_the_same_function_with_larger_inputs(case: Any) -> None:
    clean, planted = outliers.open_model(case, 1), outliers.open_model(case, 32)
    reference = list(outliers.log_probabilities(clean, case.held_out))
    assert abs(outliers.divergence(reference, planted, case.held_out)) < 1e-6
    for name in ("input_layernorm", "post_attention_layernorm"):
        ratio = planted.get_parameter(f"model.layers.1.{name}.weight") / clean.get_parameter(f"model.layers.1.{name}.weight")
        assert ratio[::32].tolist() == [32, 32] and float(ratio.sum()) == 62 + 64
    columns = planted.model.layers[0].mlp.up_proj.weight / clean.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(columns[:, 32], torch.full((128,), 1 / 32))


def test_each_system_has_its_rows_and_outliers_cost_the_first_the_most(case: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = outliers.measure(case, 32.0, [], ["w4", "w8a8"])
    assert {(row.case, row.system) for row in rows} == {
        (f"{scheme} {kind}", system)
        for scheme in ("w4", "w8a8")
        for kind in ("clean", "planted")
        for system in outliers.systems()
        if (scheme, system) != ("w4", "llm.int8")
    }
    cost = {(row.case, row.system): row.value for row in rows if row.metric == "planted"}
    for scheme in ("w4 planted", "w8a8 planted"):
        assert cost[scheme, "rtn"] > 2
        assert all(cost[scheme, system] < 1.2 for system in ("awq", "smoothquant", "rotation")), cost


def test_only_names_of_systems_are_measured_beside_rounding(case: Any) -> None:
    assert {row.system for row in outliers.measure(case, 32.0, ["rotation"], ["w4"])} == {"rtn", "rotation"}
