"""Stage quantize with inputs, keys and values: what is stored, from files as from memory, measured as it is stored, padding left out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record
from decoct.qat.codes.state import load_quant_state
from decoct.qat.export.export import export_folder
from decoct.qat.ptq import CalibrationText
from decoct.qat.rebuild import load_exported_model
from decoct.qat.scheme import SpecChange
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.trainer.data.prepared_data import PreparedData
from decoct.trainer.evaluation.figures import evaluate_model
from decoct.trainer.evaluation.model_row import measure_teacher, open_for_measuring
from decoct.trainer.settings_quantization import QuantizeSettings
from decoct.trainer.stages import calibration
from decoct.trainer.stages.context import StageContext
from decoct.trainer.stages.quantize import finish

MakeContext = Callable[..., StageContext]
STATIC = ActivationSpec(scaling="static")
FP8 = ActivationSpec(kind="fp8_e4m3", scaling="static")
W8A8 = QuantizeSettings(weights=QuantSpec(bits=8, group_size="channel"), activations=STATIC, kv_cache=FP8, calibration_tokens=4096)


def hashes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "decoct.json"}


def said(context: StageContext) -> str:
    return cast(Any, context.run.console.file).getvalue()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_from_files_is_as_from_memory_bit_for_bit(make_context: MakeContext, method: Any) -> None:
    settings = QuantizeSettings(weights=W8A8.weights, activations=STATIC, kv_cache=FP8, method=method, calibration_tokens=4096)
    whole, streamed = make_context("01-whole"), make_context("01-streamed")
    finish(replace(settings, stream="never"), whole, None)
    finish(replace(settings, stream="always"), streamed, None)
    assert hashes(streamed.model) == hashes(whole.model)
    assert read_record(streamed.model)["quant"] == read_record(whole.model)["quant"]
    assert "by " + method + ", inputs in int8, static, keys and values in fp8_e4m3, static" in said(whole)
    assert "4,096/" not in said(whole) and "layer tokens" in said(whole)
    assert ("squared output error" in said(whole)) == (method == "gptq")


def test_the_folder_is_measured_as_it_will_be_served(make_context: MakeContext, trained_folder: Path) -> None:
    context = make_context("01-quantize")
    finish(W8A8, context, None)
    state = load_quant_state(context.model)
    assert state.activations == STATIC and state.cache is not None and state.cache.spec == FP8
    assert set(state.input_scales) == set(state.modules)
    assert len(state.cache.scales) == 2 * 3
    stored, plain = open_for_measuring(str(context.model)), load_model(context.model, dtype=torch.float32)
    teacher = measure_teacher(str(trained_folder), None, context.run.v_eff)
    lost = [evaluate_model(model, teacher, context.run.data.evaluation).kl for model in (plain, stored)]
    assert lost[0] is not None and lost[1] is not None
    assert 0 < 3 * lost[0] < lost[1] < 0.05, "keys, values and inputs cost more than weights of 8 bits, and little"


def test_what_needs_no_text_takes_none(make_context: MakeContext) -> None:
    context = make_context("01-quantize")
    finish(QuantizeSettings(weights=W8A8.weights, activations=ActivationSpec(), kv_cache=ActivationSpec()), context, None)
    assert "calibration" not in read_record(context.model)["quant"]["rounding"]
    state = load_quant_state(context.model)
    assert state.cache is not None and not state.cache.scales and not state.input_scales


def test_padding_is_in_no_range(make_context: MakeContext, prepared: Callable[..., PreparedData], monkeypatch: pytest.MonkeyPatch) -> None:
    padded, choose = prepared(packing=False), calibration.calibration_text
    fillers = iter((0, 7))

    def dirty(*arguments: Any) -> CalibrationText:
        text, filler = choose(*arguments), next(fillers)
        for batch in text.batches:
            batch["input_ids"][batch["attention_mask"] == 0] = filler
        return text

    monkeypatch.setattr(calibration, "calibration_text", dirty)
    found = []
    for name in ("01-clean", "01-dirty"):
        context = make_context(name, data=padded)
        finish(W8A8, context, None)
        found.append(load_quant_state(context.model).hash())
    assert found[0] == found[1]


def test_packed_documents_are_calibrated_apart(make_context: MakeContext, prepared: Callable[..., PreparedData]) -> None:
    """Windows that hold several documents run with positions that start again, and have no padding."""
    context = make_context("01-quantize", data=prepared(packing=True))
    finish(W8A8, context, None)
    assert load_quant_state(context.model).cache is not None


def test_columns_with_outliers_are_counted_on_the_text_and_told(make_context: MakeContext, trained_folder: Path) -> None:
    settings = QuantizeSettings(weights=W8A8.weights, activations=ActivationSpec(outliers=2.0), calibration_tokens=4096)
    whole, streamed = make_context("01-whole"), make_context("01-streamed")
    finish(replace(settings, stream="never"), whole, None)
    finish(replace(settings, stream="always"), streamed, None)
    shares = read_record(whole.model)["quant"]["rounding"]["outlier_columns"]
    assert read_record(streamed.model)["quant"]["rounding"]["outlier_columns"] == shares
    assert 0 < shares[""] < 1 and {"q_proj", "down_proj"} < set(shares)
    assert shares["q_proj"] == shares["k_proj"], "they read the same inputs"
    assert "inputs of at least 2, which stay in 16 bits, are in " in said(whole)
    assert load_quant_state(whole.model).activations == settings.activations


def test_a_threshold_that_keeps_everything_is_refused(make_context: MakeContext) -> None:
    context = make_context("01-quantize")
    with pytest.raises(UserError, match=r"outliers=1e-06 rounds nothing: .*use a larger threshold"):
        finish(QuantizeSettings(weights=W8A8.weights, activations=ActivationSpec(outliers=1e-6), calibration_tokens=4096), context, None)
    assert not context.model.exists()


def test_keys_and_values_have_no_outliers() -> None:
    with pytest.raises(ValueError, match=r"kv_cache\.outliers has no effect"):
        QuantizeSettings(kv_cache=ActivationSpec(outliers=6.0))


def test_w8a8_with_an_fp8_cache_is_packed_exactly_without_training(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context("01-quantize")
    finish(W8A8, context, None)
    result = export_folder(context.model, tmp_path / "served", "compressed-tensors", runtimes=False)
    assert result.exact
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        found, expected = (
            model(input_ids=ids, use_cache=False).logits
            for model in (load_exported_model(tmp_path / "served"), open_for_measuring(str(context.model)))
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, None),
        ({"activations": ActivationSpec()}, None),
        ({"kv_cache": ActivationSpec()}, None),
        ({"activations": STATIC}, 262_144),
        ({"activations": ActivationSpec(outliers=6.0)}, 262_144),
        ({"kv_cache": FP8, "method": "mse"}, 262_144),
        ({"kv_cache": FP8, "calibration_tokens": 1000}, 1000),
        ({"method": "gptq", "activations": STATIC}, 262_144),
    ],
)
def test_static_scales_look_at_text(given: dict[str, Any], tokens: int | None) -> None:
    settings = QuantizeSettings(**given)
    assert settings.calibration_tokens == tokens and settings.calibrates == (tokens is not None)


@pytest.mark.parametrize("end", ["embedding", "head"])
def test_embedding_and_head_have_no_inputs_to_round(end: str) -> None:
    change: Any = {end: SpecChange(bits=8)}
    with pytest.raises(ValueError, match=f"{end} cannot be rounded together with activations"):
        QuantizeSettings(activations=ActivationSpec(), **change)


def test_every_kind_of_weight_goes_with_a_rounded_cache(make_context: MakeContext) -> None:
    """Embedding and layers, of different lattices, integers and floats."""
    change = SpecChange(kind="int", bits=8, group_size="channel", symmetric=True)
    for number, weights in enumerate((QuantSpec(bits=4, group_size=16, symmetric=False), QuantSpec(kind="nf4", group_size=16))):
        settings = QuantizeSettings(weights=weights, embedding=change, kv_cache=FP8, calibration_tokens=2048)
        whole, streamed = make_context(f"01-whole-{number}"), make_context(f"01-streamed-{number}")
        finish(replace(settings, stream="never"), whole, None)
        finish(replace(settings, stream="always"), streamed, None)
        assert hashes(streamed.model) == hashes(whole.model)
        state = load_quant_state(whole.model)
        assert state.cache is not None and len(state.cache.scales) == 6
        open_for_measuring(str(whole.model))


@pytest.mark.parametrize("given", [{"activations": ActivationSpec()}, {"kv_cache": ActivationSpec(), "method": "mse"}])
def test_dynamic_scales_do_not(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="calibration_tokens=1000 has no effect with method="):
        QuantizeSettings(calibration_tokens=1000, **given)
