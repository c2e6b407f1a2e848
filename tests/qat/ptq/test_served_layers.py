"""Inputs, keys and values that are rounded beside weights: their ranges, what GPTQ sees of them, and what the next layer is given."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoct.models.calibration.factor import factorize
from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.families import decoder_layers
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.streaming import empty_model
from decoct.qat.fake_quant import dequantize, fake_quant_activation, quantize, static_scale
from decoct.qat.layers.as_stored import round_as_stored
from decoct.qat.layers.input_hooks import round_inputs
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.ptq import CalibrationText, RoundedModel, RoundingMethod, amount_of_work, round_model
from decoct.qat.ptq.gptq import gptq_codes
from decoct.qat.spec import ActivationSpec, QuantSpec

from .test_walk import STEPS

SPEC = QuantSpec(bits=8, group_size="channel")
DYNAMIC, STATIC = ActivationSpec(), ActivationSpec(scaling="static")
FP8 = ActivationSpec(kind="fp8_e4m3", scaling="static")
RandomModel = Callable[..., PreTrainedModel]


def windows(count: int = 8, length: int = 24) -> Tensor:
    return torch.randint(0, 258, (count, length), generator=torch.Generator().manual_seed(1))


def text_of(ids: Tensor, batch: int = 4, **more: Tensor) -> CalibrationText:
    parts = {"input_ids": ids, **more}
    return CalibrationText(batches=[{k: v[at : at + batch] for k, v in parts.items()} for at in range(0, len(ids), batch)])


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=windows(3), use_cache=False).logits


def linears_of(model: PreTrainedModel, layer: int) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"model.layers.{layer}.")}


def passes(model: PreTrainedModel, layer: int, ids: Tensor) -> dict[str, Tensor]:
    """What each linear of a layer reads in a whole forward pass over ``ids`` (before any hook of its own)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, x: seen.update({name: x[0]})

    handles = [linear.register_forward_pre_hook(keep(name), prepend=True) for name, linear in linears_of(model, layer).items()]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("spec", [STATIC, ActivationSpec(scaling="static", symmetric=False)], ids=["symmetric", "asymmetric"])
def test_static_scales_are_those_of_whole_passes_through_the_rounded_model(random_model: RandomModel, spec: ActivationSpec) -> None:
    ids = windows()
    rounded = round_model(random_model("llama"), SPEC, RoundingMethod(activations=spec), text=text_of(ids)).state
    again = random_model("llama")
    fold(again, quantize_model(again, SPEC))
    for layer in range(len(decoder_layers(again))):
        read = passes(again, layer, ids)
        inputs = round_inputs(again, read, spec)
        for name, x in read.items():
            scale, zero = static_scale(x.min(), x.max(), spec)
            assert torch.allclose(rounded.input_scales[name], scale, rtol=1e-5)
            assert rounded.input_zeros.get(name) == zero
        inputs.set_scales(rounded.input_scales, rounded.input_zeros)
    assert rounded.activations == spec
    rounded.check("memory")


@pytest.mark.parametrize(
    "rounding", [RoundingMethod(activations=DYNAMIC, kv_cache=FP8), RoundingMethod(activations=STATIC, kv_cache=DYNAMIC)]
)
def test_the_model_in_memory_computes_as_the_stored_one(random_model: RandomModel, rounding: RoundingMethod) -> None:
    rounded = round_model(model := random_model("qwen3"), SPEC, rounding, text=text_of(windows()))
    again = random_model("qwen3")
    fold(again, rounded.state)
    plain = logits(again)
    round_as_stored(again, rounded.state)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), plain)


@pytest.mark.parametrize("kind", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_hessians_are_of_unrounded_inputs_given_what_served_layers_give(random_model: RandomModel, kind: ActivationSpec) -> None:
    """By whole passes: every layer in turn, the ones before it rounded with their inputs, of this one the linears that ran before."""
    spec, ids = QuantSpec(bits=3, group_size=16), windows(12)
    rounding = RoundingMethod(method="gptq", scale="absmax", activations=kind)
    rounded = round_model(random_model("llama"), spec, rounding, text=text_of(ids)).state
    model = random_model("llama")
    for layer in range(len(decoder_layers(model))):
        for step in STEPS:
            for name, x in passes(model, layer, ids).items():
                if name.split(f"layers.{layer}.")[-1] not in step:
                    continue
                rows, linear = x.flatten(0, 1).double(), model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                factor = factorize((2 / len(rows) * rows.T @ rows).float())
                assert factor is not None
                scales = quantize(linear.weight, spec)[1]
                codes = gptq_codes(linear.weight, scales, factor, spec)
                assert (codes != rounded.codes[name]).float().mean() < 0.03, name  # near ties fall by the order of sums
                linear.weight.data = dequantize(rounded.codes[name], rounded.scales[name])
        round_inputs(model, linears_of(model, layer), kind).set_scales(rounded.input_scales, rounded.input_zeros)


@pytest.mark.parametrize("rounding", [RoundingMethod(method="gptq", activations=DYNAMIC), RoundingMethod(method="gptq", kv_cache=DYNAMIC)])
def test_only_what_comes_from_served_layers_changes_a_hessian(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch, rounding: RoundingMethod
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "decoct.qat.ptq.methods.factorize", lambda hessian, *more: seen.append(hessian.clone()) or factorize(hessian, *more)
    )
    for one in (RoundingMethod(method="gptq"), rounding):
        round_model(random_model("llama"), SPEC, one, text=text_of(windows()))
    blind, served = seen[:8], seen[8:]
    assert len(served) == 8
    assert all(torch.equal(one, other) for one, other in zip(blind[:4], served[:4])), "nothing of the first layer was rounded before"
    assert not any(torch.equal(one, other) for one, other in zip(blind[4:], served[4:]))


def test_keys_and_values_of_each_layer_have_the_range_of_the_text(random_model: RandomModel) -> None:
    ids, mask = windows(), torch.ones(8, 24, dtype=torch.int64)
    mask[::2, 15:] = 0
    found = []
    for filler in (3, 200):
        text = text_of(ids.masked_fill(mask == 0, filler), attention_mask=mask)
        state = round_model(random_model("llama"), SPEC, RoundingMethod(kv_cache=FP8, activations=STATIC), text=text).state
        assert state.cache is not None
        assert state.cache.attentions == ("model.layers.0.self_attn", "model.layers.1.self_attn")
        found.append(state)
    assert found[0].hash() == found[1].hash(), "what stands behind the text is in no range"
    values = passes(again := random_model("llama"), 0, ids)["model.layers.0.self_attn.v_proj"][mask.bool()]
    fold(again, quantize_model(again, SPEC))
    values = again.get_submodule("model.layers.0.self_attn.v_proj")(values)
    scale, _ = static_scale(values.min(), values.max(), FP8)
    assert torch.allclose(found[0].cache.scales["model.layers.0.self_attn.v"], scale, rtol=2**-8)


def test_more_text_is_no_narrower(random_model: RandomModel) -> None:
    """A maximum over all positions: the scale of more windows is at least that of fewer."""
    found = [
        round_model(random_model("llama"), SPEC, RoundingMethod(activations=STATIC), text=text_of(windows(16)[:count])).state
        for count in (2, 16)
    ]
    first = "model.layers.0.self_attn.q_proj"
    assert found[0].input_scales[first] <= found[1].input_scales[first]
    assert any(few < many for few, many in zip(found[0].input_scales.values(), found[1].input_scales.values()))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_from_files_is_as_from_memory(random_model: RandomModel, tmp_path: Path, method: Any) -> None:
    rounding = RoundingMethod(method=method, activations=STATIC, kv_cache=FP8)
    whole = round_model(random_model("llama"), SPEC, rounding, text=text_of(windows()))
    folder = save_model_folder(tmp_path / "model", random_model("llama"), None, {}, dtype=torch.float32)
    work = tmp_path / "work"
    work.mkdir()
    model, files = empty_model(str(folder), None)
    with files:
        streamed = round_model(model, SPEC, rounding, text=text_of(windows()), files=files, work=work)
    assert streamed.state.hash() == whole.state.hash()


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("activations", [None, DYNAMIC, STATIC])
def test_work_is_what_was_announced(random_model: RandomModel, method: Any, activations: ActivationSpec | None) -> None:
    rounding, text = RoundingMethod(method=method, activations=activations), text_of(windows())
    expected = amount_of_work(random_model("llama"), SPEC, rounding, (), text)
    done: list[int] = []
    round_model(random_model("llama"), SPEC, rounding, text=text, advance=done.append)
    assert sum(done) == expected
    weights = sum(linear.weight.numel() for layer in (0, 1) for linear in linears_of(random_model("llama"), layer).values())
    looks = (method == "gptq") + (activations is STATIC)
    assert expected == (text.tokens * (2 * looks + 1) if looks else weights)


def test_dynamic_rounding_takes_no_text_and_changes_no_code(random_model: RandomModel) -> None:
    rounded: RoundedModel = round_model(random_model("llama"), SPEC, RoundingMethod(activations=DYNAMIC, kv_cache=DYNAMIC))
    plain = quantize_model(random_model("llama"), SPEC)
    assert all(torch.equal(rounded.state.codes[name], plain.codes[name]) for name in plain.modules)
    assert rounded.state.activations == DYNAMIC and rounded.state.cache is not None and not rounded.state.input_scales


def test_skipped_modules_read_what_they_are_given(random_model: RandomModel) -> None:
    rounding = RoundingMethod(activations=STATIC)
    state = round_model(random_model("llama"), SPEC, rounding, skip=["*.down_proj", "*.layers.1.*"], text=text_of(windows())).state
    assert set(state.input_scales) == set(state.modules) and len(state.modules) == 6


@pytest.mark.parametrize("rounding", [RoundingMethod(activations=STATIC), RoundingMethod(kv_cache=FP8, method="mse")])
def test_text_is_needed(random_model: RandomModel, rounding: RoundingMethod) -> None:
    with pytest.raises(
        UserError, match="static scales of activations or kv_cache need calibration text, and there is none; raise calibration_tokens"
    ):
        round_model(random_model("llama"), SPEC, rounding)


@pytest.mark.parametrize("rounding", [RoundingMethod(activations=STATIC), RoundingMethod(kv_cache=FP8)])
def test_a_range_that_is_none_is_said(random_model: RandomModel, rounding: RoundingMethod) -> None:
    model = random_model("llama")
    model.get_submodule("model.layers.1.input_layernorm").get_parameter("weight").data[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"the range of model\.layers\.1\.self_attn\.(q_proj|k) is NaN or infinite"):
        round_model(model, SPEC, rounding, text=text_of(windows()))


def test_the_error_of_int8_inputs_is_small_and_of_static_ones_larger(random_model: RandomModel) -> None:
    """W8A8 on random weights: a sanity check of the numbers, in the order in which they must come."""
    plain, lost = logits(random_model("llama")), []
    for rounding in (RoundingMethod(), RoundingMethod(activations=DYNAMIC), RoundingMethod(activations=STATIC)):
        model = random_model("llama")
        round_model(model, SPEC, rounding, text=text_of(windows(32)))
        lost.append(float((logits(model) - plain).square().mean()))
    assert all(less < more for less, more in pairwise(lost))
    assert lost[2] < 0.01 * float(plain.var())


def test_one_token_is_rounded_as_the_op_says(random_model: RandomModel) -> None:
    model = random_model("llama")
    state = round_model(model, SPEC, RoundingMethod(activations=STATIC), text=text_of(windows())).state
    name = "model.layers.0.mlp.up_proj"
    linear, x = model.get_submodule(name), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(fake_quant_activation(x, STATIC, scale=state.input_scales[name]), state.dequantized(name))
    assert torch.equal(linear(x), expected)
