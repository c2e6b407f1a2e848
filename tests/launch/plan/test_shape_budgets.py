"""A plan says what the search of a budget or the rounds of a shape will try, and refuses what no shape can meet."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import Plan, plan
from decoct.launch.plan.show import short_form
from decoct.launch.plan.stage_shapes import ImpossibleStageError

FIELDS = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}


def planned(folder: Path, structured: dict[str, Any], *later: dict[str, Any]) -> Plan:
    AutoConfig.for_model("llama", vocab_size=512, tie_word_embeddings=True, **FIELDS).save_pretrained(folder / "m")
    stages = [{"prune": {"structured": structured}}, *later]
    made = {"name": "m", "student": {"path": str(folder / "m")}, "data": {"files": ["x"], "seq_length": 32}, "stages": stages}
    return plan(recipe_from_dict(made, ()))


def test_it_says_how_many_shapes_are_measured_and_distilled(tmp_path: Path) -> None:
    made = planned(tmp_path, {"budget": 0.5}, {"pretrain": {"steps": 4}})
    (told,) = [note for note in made.stages[0].notes if note.startswith("search")]
    assert "aligned shapes within 50.0% of the decoder layers' parameters (" in told
    assert "the KL of 13 as cut is measured on 8 windows" in told
    assert f"01-prune: {told}" in short_form(made)
    whole, halved = 6 * (3 * 256 * 1024 + 2 * 256 * 256 + 2 * 256 * 64 + 2 * 256), made.stages[1].parameters
    # the tied table and the final norm stay outside the count
    assert halved is not None and 0.9 * 0.5 * whole < halved - 512 * 128 and halved < 0.5 * whole + 513 * 256
    assert "llama, 5 layers, hidden 192, ffn 768" in made.stages[1].shape

    tried = {"budget": 0.5, "search": {"measured": 10, "tokens": "100k", "halving": [8, 2]}}
    told = " ".join(planned(tmp_path, tried).stages[0].notes)
    assert "the KL of 10 as cut" in told
    assert "search: distils 8 shapes on 100,000 tokens each, then 2 shapes on 400,000 tokens each: 1,600,000 tokens in all" in told


def test_a_budget_that_no_shape_meets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ImpossibleStageError, match=r"01-prune: the budget of 1\.0% .* is below the smallest aligned shape, ffn=384,heads=3,kv=1"
    ):
        planned(tmp_path, {"budget": 0.01})
    with pytest.raises(ImpossibleStageError, match=r"01-prune: the budget of 500\.0 MB holds the whole model \(\d+\.\d MB\); give less"):
        planned(tmp_path, {"budget": "500MB"})


def test_widths_that_a_search_will_choose_are_not_judged_by_those_of_the_input(tmp_path: Path) -> None:
    later = {"prune": {"name": "again", "structured": {"ffn": 1024}}}
    with pytest.raises(ImpossibleStageError, match=r"02-again: .*ffn=1024 keeps more FFN channels than the student's \d+"):
        planned(tmp_path, {"budget": 0.3}, later)


def test_it_names_the_shapes_of_all_rounds(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", vocab_size=512, **FIELDS).save_pretrained(tmp_path / "m")
    stage = {"prune": {"structured": {"ffn": 512, "layers": 4, "rounds": 0.3}, "tokens": "1M"}}
    made = {"name": "m", "student": {"path": str(tmp_path / "m")}, "data": {"files": ["x"], "seq_length": 32}, "stages": [stage]}
    (only,) = plan(recipe_from_dict(made, ())).stages
    (told,) = [note for note in only.notes if "rounds" in note]
    assert told.startswith("cuts in 3 rounds and distils after each: ")
    assert told.count("of the decoder layers' parameters") == 3
    # it trains as a distillation does, on all the tokens
    assert only.training is not None and only.training.tokens >= 1_000_000
    rate = next(value for value in only.values if value.key.endswith("learning_rate"))
    assert "0.0011" in str(rate)
