"""What a plan says of widths that a stage will choose: the sizes between which it chooses, and the sizes of what follows."""

from typing import Any

import pytest

from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import Plan, plan
from decoct.launch.plan.show import as_json, short_form
from decoct.models.common.errors import UserError

BODY = 6_979_321_856
"""Weights of the decoder's linears of the model."""
REST = 2 * (8_030_261_248 - BODY)
"""Bytes of everything else."""


def planned(weights: dict[str, Any], *formats: str, kind: str = "quantize", **stage: Any) -> Plan:
    data = {"builtin": "python-stdlib", "seq_length": 2048}
    stages: list[dict[str, Any]] = [{kind: {"weights": {"bits": "auto", **weights}, **stage}}, {"export": {"formats": list(formats)}}]
    given = {"name": "x", "student": {"path": "meta-llama/Llama-3.1-8B"}, "data": data, "stages": stages}
    return plan(recipe_from_dict(given), gpus=1, gpu_memory=80 * 10**9)


def packed(made: Plan) -> float:
    """Bytes of the export's linears; the rest of the model is in 16 bits."""
    return made.stages[1].exports["compressed-tensors"] - REST


@pytest.mark.parametrize("budget", [3.5, 5.0])
def test_the_export_has_the_size_of_the_budget(budget: float) -> None:
    made = planned({"budget": budget}, "compressed-tensors")
    assert 0.99 * budget * BODY / 8 < packed(made) < 1.001 * budget * BODY / 8
    # no matrix is left alone so that others get a smaller width
    assert made.stages[0].coverage == 1
    # bytes of the whole model: the same in another form
    size = (budget * BODY / 8 + REST) / 1e9
    again = planned({"budget": f"{size:.6f} GB"}, "compressed-tensors")
    assert packed(again) == pytest.approx(packed(made), rel=1e-3)


def test_the_note_says_between_what_and_how_long() -> None:
    told = short_form(planned({"budget": 3.5}, "compressed-tensors"))
    assert "01-quantize: chooses among 2, 4, 8 and 16 bits for 128 groups of 224 linears" in told
    assert "from 1.85 GB (2.125 bits per weight) to 14 GB (16 bits per weight)" in told
    assert "the budget, 3.5 bits per weight, is 3.05 GB (3.5 bits per weight), as served with everything else 5.16 GB" in told
    # forward twice, back 4 times, a product for each of 3 widths, and 5 assignments to try
    assert "sensitivity (cheap) on at most 16.4k tokens" in told and "about 14 forward passes" in told
    assert "from each group on at each width" not in told
    exact = planned({"budget": 3.5, "sensitivity": "exact", "widths": [2, 4], "sensitivity_tokens": 4096}, "gguf-q2_0")
    assert "sensitivity (exact) on at most 4.1k tokens" in short_form(exact)
    assert "about 12 forward passes, and from each group on at each width" in short_form(exact)


def test_values_are_those_of_the_recipe() -> None:
    made = planned({"budget": 3.5}, "compressed-tensors", kind="qat", tokens="100k")
    values = {one["key"]: one["value"] for one in as_json(made)["stages"][0]["values"]}
    assert values["stages.0.qat.weights.bits"] == "auto" and values["stages.0.qat.overrides"] == {}
    assert packed(made) < 3.5 * BODY / 8 * 1.001


def test_a_width_that_is_named_counts_and_stays() -> None:
    pinned = {"*.down_proj": {"bits": 8}}
    made = planned({"budget": 5}, "compressed-tensors", overrides=pinned)
    assert "for 96 groups of 224 linears" in short_form(made)
    assert 0.99 * 5 * BODY / 8 < packed(made) < 1.001 * 5 * BODY / 8
    with pytest.raises(UserError, match=r"is below 3\.74 bits per weight, which the model takes with 2 bits where overrides name no width"):
        planned({"budget": 3.5}, "compressed-tensors", overrides=pinned)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"budget": 2.1},
            r"stages\.0\.quantize\.weights\.budget=2\.1 .* is below 2\.125 bits per weight, which the model takes with 2 bits",
        ),
        ({"budget": "2GB"}, r"budget=2GB \(2,000,000,000 bytes\) is below 3,9.. *"),
        ({"budget": "20GB"}, r"holds the model with its linears unquantized, so there is nothing to choose; lower it"),
    ],
)
def test_a_budget_that_nothing_meets_is_refused_by_the_plan(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(weights, "compressed-tensors")
