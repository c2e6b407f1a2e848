"""Widths to choose among are those that the exports behind the stage can hold; the settings of such recipes are read and written."""

from typing import Any, cast

import pytest

from decoct.configs import recipe_from_dict
from decoct.configs.recipe import Recipe, resolved
from decoct.models.common.errors import UserError
from decoct.qat.auto_weights import WeightSettings
from decoct.qat.spec import QuantSpec

DATA = {"builtin": "python-stdlib", "seq_length": 64, "eval_tokens": "8k"}


def read(weights: dict[str, Any], *formats: str, stage: dict[str, Any] | None = None, export: dict[str, Any] | None = None) -> Recipe:
    stages: list[dict[str, Any]] = [{"quantize": {"weights": weights, **(stage or {})}}]
    if formats:
        stages.append({"export": {"formats": list(formats), **(export or {})}})
    return recipe_from_dict({"name": "x", "student": {"path": "somewhere"}, "data": DATA, "stages": stages})


def widths(*formats: str, budget: float = 6.0, stage: dict[str, Any] | None = None, **export: Any) -> tuple[int, ...]:
    read_weights = read({"bits": "auto", "budget": budget}, *formats, stage=stage, export=export).stages[0].settings.weights
    return cast(WeightSettings, read_weights).given_widths


def test_a_recipe_with_a_budget_is_written_and_read_again() -> None:
    recipe = read({"bits": "auto", "budget": "60MB", "group_size": 32}, "gptq")
    assert recipe_from_dict(resolved(recipe)) == recipe


def test_a_number_of_bits_stays_a_plain_spec_with_the_keys_of_before() -> None:
    recipe = read({"bits": 3, "group_size": 32})
    assert recipe.stages[0].settings.weights == QuantSpec(bits=3, group_size=32)
    assert set(resolved(recipe)["stages"][0]["quantize"]["weights"]) == {
        "kind",
        "bits",
        "group_size",
        "symmetric",
        "divisor",
        "scale_grid",
        "ternary",
    }


def test_exports_narrow_the_widths() -> None:
    assert widths() == (2, 3, 4, 8, 16)
    assert widths("gptq") == widths("compressed-tensors") == (2, 4, 8, 16)
    assert widths("compressed-tensors", reader_version="0.18.0") == (2, 3, 4, 8, 16)
    assert widths("awq", "compressed-tensors") == (4, 16)
    # blocks of 4 bits hold codes of 2 and 3 bits too, and save nothing
    assert widths("gguf") == (4, 8, 16)
    assert widths("gguf-q2_0") == (2, 4, 8, 16)
    assert widths("safetensors-f32") == (2, 3, 4, 8, 16)


@pytest.mark.parametrize(
    ("weights", "formats", "message"),
    [
        (
            {"widths": [3, 4], "budget": 3.5},
            ["compressed-tensors", "gptq"],
            "stages.0.quantize.weights.widths: leaves fewer than two widths to choose from: 3 bits: compressed-tensors packs 3 bits",
        ),
        ({"widths": [2, 3, 4], "budget": 3.5}, ["gptq"], "3 bits: gptq packs 2, 4 and 8 bits, not 3; use [2, 4]"),
        ({"widths": [2, 4, 8], "budget": 4.5}, ["gguf"], "2 bits: gguf stores them in as many bytes as 4; use [4, 8]"),
        ({"budget": 3.5}, ["gguf"], "stages.0.quantize.weights.budget: budget=3.5 is below 4 bits, the smallest of widths"),
        ({"budget": 5, "kind": "mxfp4"}, [], "kind='mxfp4' has codes of 4 bits, not auto"),
    ],
)
def test_widths_that_an_export_cannot_hold_are_named(weights: dict[str, Any], formats: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read({"bits": "auto", **weights}, *formats)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"embedding": {"group_size": 32}},
            "embedding: weights.bits=auto chooses among linears of the decoder layers; give embedding.bits",
        ),
        ({"stream": "always"}, "stream=always reads one layer at a time, and weights.bits=auto looks at the whole model; use stream=never"),
    ],
)
def test_what_does_not_go_together_is_refused(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read({"bits": "auto", "budget": 4}, stage=stage)
    assert message in str(caught.value)


def test_the_widths_need_text_as_calibration_does() -> None:
    data = {**DATA, "eval_tokens": "all"}
    stages = [{"quantize": {"weights": {"bits": "auto", "budget": 4}}}]
    with pytest.raises(UserError, match="is 'all', which leaves no text for the stages that need some"):
        recipe_from_dict({"name": "x", "student": {"path": "somewhere"}, "data": data, "stages": stages})
    qat = [{"qat": {"tokens": "10k", "weights": {"bits": "auto", "budget": 4}, "anneal_from": 8}}]
    with pytest.raises(UserError, match=r"falls to a number of bits, and weights\.bits=auto has several"):
        recipe_from_dict({"name": "x", "student": {"path": "somewhere"}, "data": DATA, "stages": qat})
