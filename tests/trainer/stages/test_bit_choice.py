"""Widths chosen by sensitivity within a budget: what a stage writes, that it does not choose twice, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record
from decoct.models.teachers import load_teacher
from decoct.qat.auto_weights import WeightSettings
from decoct.qat.codes.state import load_quant_state
from decoct.qat.export.export import export_folder
from decoct.qat.ptq.sensitivity import Sensitivity
from decoct.qat.scheme import SpecChange
from decoct.qat.spec import QuantSpec
from decoct.qat.transforms.settings import TransformSettings
from decoct.trainer.evaluation.figures import evaluate_model
from decoct.trainer.settings_quantization import QatSettings, QuantizeSettings
from decoct.trainer.stages import bit_choice, qat, quantize
from decoct.trainer.stages.context import StageContext

MakeContext = Callable[..., StageContext]
CALIBRATED: dict[str, dict[str, Any]] = {"awq": {"calibration_tokens": 512}}


def auto(budget: float | str = 4.0, **more: Any) -> WeightSettings:
    return WeightSettings(bits="auto", budget=budget, **{"group_size": 16, "sensitivity_tokens": 512, **more})


def said(context: StageContext) -> str:
    return cast(Any, context.run.console.file).getvalue()


def kl(context: StageContext, teacher: Path) -> float:
    model = load_model(context.model, dtype=torch.float32)
    whole = load_teacher(str(teacher), dtype=torch.float32, v_eff=context.run.v_eff)
    found = evaluate_model(model, whole, context.run.data.evaluation).kl
    assert found is not None
    return found


def test_the_budget_holds_and_what_is_joined_moves_together(make_context: MakeContext) -> None:
    context = make_context("01-quantize")
    settings = QuantizeSettings(weights=auto(4.0), overrides={"*.2.mlp.down_proj": SpecChange(bits=5)})
    result = quantize.finish(settings, context, None)
    # what the report shows
    chosen = result.facts["bits"]
    assert 3.5 < chosen["bits_per_weight"] <= 4.0 and chosen["budget"] == "4 bits per weight"
    assert chosen["rank_correlation"]["cheap, second_order"] > 0.8
    assert read_record(context.model)["quant"]["rounding"]["bits"] == chosen
    assert "widths within 4 bits per weight: " in said(context) and "self_attn.q_proj" in said(context)
    # codes are those of the choice
    state = load_quant_state(context.model)
    assert {name: state.spec_of(name).bits for name in state.modules} == {n: w for n, w in chosen["widths"].items() if w != 16}
    assert chosen["widths"]["model.layers.2.mlp.down_proj"] == 5
    for layer in range(3):
        assert len({chosen["widths"][f"model.layers.{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert len({chosen["widths"][f"model.layers.{layer}.mlp.{part}_proj"] for part in ("gate", "up")}) == 1
    assert len(set(chosen["widths"].values())) > 2


# a scale takes a bit per weight, and 48 codes of 3 bits fill 5 words
@pytest.mark.parametrize(("bits", "budget"), [(2, 3.2), (3, 4.4)])
def test_a_budget_buys_more_than_one_width_does(make_context: MakeContext, trained_folder: Path, bits: int, budget: float) -> None:
    uniform, context = make_context("01-uniform"), make_context("02-auto")
    quantize.finish(QuantizeSettings(weights=QuantSpec(bits=bits, group_size=16)), uniform, None)
    chosen = quantize.finish(QuantizeSettings(weights=auto(budget, sensitivity_tokens=4096)), context, None).facts["bits"]
    tried = chosen["calibration_kl"]
    assert tried[chosen["chosen_by"]] == min(tried.values()) < tried[f"{bits} bits everywhere"]
    # and on text that the choice has not seen
    assert kl(context, trained_folder) < kl(uniform, trained_folder)


@pytest.mark.usefixtures("warm_judges")
def test_exports_hold_mixed_widths_exactly(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context("01-quantize")
    quantize.finish(QuantizeSettings(weights=auto("61kB", widths=(2, 4, 8), sensitivity="second_order", group_size=16)), context, None)
    bits = load_quant_state(context.model)
    assert len({bits.spec_of(name).bits for name in bits.modules}) > 1
    for form in ("compressed-tensors", "safetensors-f32"):
        assert export_folder(context.model, tmp_path / form, form).rounding is None


def test_what_is_chosen_once_is_not_chosen_again(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context("01-quantize")
    settings = QuantizeSettings(weights=auto(3.6))
    first = bit_choice.settle(settings, context)
    assert first.auto is None and first.overrides and type(first.weights) is QuantSpec

    def again(*_given: object, **_more: object) -> None:
        raise AssertionError("chosen again")

    monkeypatch.setattr(bit_choice, "Sensitivity", again)
    assert bit_choice.settle(settings, context) == first
    # another key means other settings, text or model
    file = context.folder / bit_choice.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"key": "another"}))
    with pytest.raises(AssertionError, match="chosen again"):
        bit_choice.settle(settings, context)
    plain = QuantizeSettings(weights=QuantSpec(bits=3))
    assert bit_choice.settle(plain, context) is plain and bit_choice.choice_facts(plain, context) == {}


@pytest.mark.usefixtures("warm_judges")
def test_qat_trains_with_the_chosen_widths(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context("01-qat", kind="qat")
    settings = QatSettings(weights=auto(4.5, widths=(2, 4, 8)), steps=2, calibration_tokens=512)
    qat.start(settings, context)
    started = load_quant_state(context.folder / "start")
    chosen = bit_choice.choice_facts(settings, context)["bits"]
    assert {name: started.spec_of(name).bits for name in started.modules} == chosen["widths"]
    assert len(set(chosen["widths"].values())) > 1
    result = qat.finish(settings, context, qat.train(settings, context))
    trained = load_quant_state(context.model)
    assert {name: trained.spec_of(name) for name in trained.modules} == {name: started.spec_of(name) for name in started.modules}
    assert result.facts["bits"] == chosen
    assert export_folder(context.model, tmp_path / "served", "compressed-tensors").rounding is None


@pytest.mark.parametrize("method", ["awq", "rotation"])
def test_a_transform_goes_with_the_chosen_widths(make_context: MakeContext, trained_folder: Path, method: Any) -> None:
    context = make_context("01-quantize")
    settings = QuantizeSettings(weights=auto(4.4), transform=TransformSettings(method=method), **CALIBRATED.get(method, {}))
    chosen = quantize.finish(settings, context, None).facts["bits"]
    state = load_quant_state(context.model)
    assert {name: state.spec_of(name).bits for name in state.modules} == {n: w for n, w in chosen["widths"].items() if w != 16}
    assert len(set(chosen["widths"].values())) > 1
    # the function of the model is kept up to rounding
    assert kl(context, trained_folder) < 0.01


def test_exact_is_measured_beside_the_estimates(make_context: MakeContext) -> None:
    context = make_context("01-quantize")
    settings = QuantizeSettings(weights=auto(3.5, sensitivity="exact", sensitivity_tokens=128, widths=(2, 4)))
    bit_choice.settle(settings, context)
    facts = bit_choice.choice_facts(settings, context)["bits"]
    assert set(facts["rank_correlation"]) == {"cheap, second_order", "cheap, exact", "second_order, exact"}
    assert facts["sensitivity"] == "exact" and min(facts["rank_correlation"].values()) > 0.6


def test_exact_figures_of_a_killed_start_are_not_measured_again(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = QuantizeSettings(weights=auto(3.5, sensitivity="exact", sensitivity_tokens=128, widths=(2, 4)))
    whole, killed = make_context("01-whole"), make_context("02-killed")
    expected = bit_choice.settle(settings, whole)
    measured: list[int] = []
    one_run = Sensitivity._with

    def dies(self: Sensitivity, *given: Any) -> float:
        measured.append(1)
        if len(measured) == 10:
            raise KeyboardInterrupt
        return one_run(self, *given)

    # two candidates in each of 12 groups: killed in the fifth group
    monkeypatch.setattr(Sensitivity, "_with", dies)
    with pytest.raises(KeyboardInterrupt):
        bit_choice.settle(settings, killed)
    assert [file.name for file in killed.folder.iterdir()] == ["bits-exact.json"]
    measured[:] = [0] * 10
    assert bit_choice.settle(settings, killed) == expected
    assert len(measured) - 10 == 2 * 12 - 2 * 4
    assert [file.name for file in killed.folder.iterdir()] == ["bits.json"]
    assert (killed.folder / "bits.json").read_bytes() == (whole.folder / "bits.json").read_bytes()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            2.5,
            "01-quantize: weights.budget=2.5 (2.5 bits per weight) is below 3 bits per weight, which the model takes with 2 bits",
        ),
        ("1MB", "01-quantize: weights.budget=1MB (1,000,000 bytes) holds the model with its linears unquantized"),
    ],
)
def test_impossible_budgets_leave_nothing(make_context: MakeContext, budget: float | str, message: str) -> None:
    context = make_context("01-quantize")
    with pytest.raises(UserError) as caught:
        quantize.finish(QuantizeSettings(weights=auto(budget)), context, None)
    assert message in str(caught.value)
    assert list(context.folder.iterdir()) == []


def test_a_model_larger_than_memory_is_refused(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_choice, "wants_streaming", lambda *_: True)
    with pytest.raises(UserError, match=r"weights\.bits=auto looks at the whole model in fp32, for which memory is too small here"):
        bit_choice.settle(QuantizeSettings(weights=auto()), make_context("01-quantize"))


def test_rank_correlation_is_spearmans() -> None:
    import numpy as np

    a, b = np.array([0.1, 3.0, 2.0, 9.0]), np.array([1.0, 2.0, 30.0, 40.0])
    # ranks 0 2 1 3 and 0 1 2 3: 1 - 6 * 2 / (4 * 15)
    assert bit_choice.rank_correlation(a, b) == pytest.approx(0.8)


@pytest.mark.parametrize("damage", ["garbage", "[]", '{"widths": 3}'])
def test_widths_are_chosen_again_where_their_file_is_damaged(make_context: MakeContext, damage: str) -> None:
    context = make_context("01-quantize")
    settings = QuantizeSettings(weights=auto(4.0))
    quantize.finish(settings, context, None)
    (context.folder / bit_choice.FILE).write_text(damage)
    assert bit_choice.choice_of(settings, context) is None
    assert "bits.json is damaged; widths are chosen again" in said(context)
