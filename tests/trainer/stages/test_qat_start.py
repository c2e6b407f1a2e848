"""What stage qat starts from when GPTQ gives it its first codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import save_model_folder
from decoct.qat.codes.state import load_quant_state
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.trainer.settings_quantization import QatSettings
from decoct.trainer.stages import qat
from decoct.trainer.stages.context import StageContext

WEIGHTS = QuantSpec(bits=3, group_size=16)


def started(context: StageContext, **changes: object) -> Path:
    qat.start(QatSettings(weights=WEIGHTS, steps=1, **changes), context)  # pyright: ignore[reportArgumentType]
    return context.folder / "start"


def test_weights_begin_as_codes_times_scales(make_context: Callable[..., StageContext]) -> None:
    folder = started(make_context("plain", kind="qat"))
    state, weights = load_quant_state(folder), load_file(folder / "model.safetensors")
    assert len(state.modules) == 21
    for name in state.modules:
        assert torch.equal(weights[f"{name}.weight"], state.dequantized(name))


@pytest.mark.parametrize("train", ["all", "scales"])
def test_zeros_of_a_sparse_model_are_its_mask_and_codes_of_zero_are_not(
    make_context: Callable[..., StageContext], trained_folder: Path, tmp_path: Path, train: str
) -> None:
    plain = make_context("sparse", kind="qat")
    model = load_model(trained_folder, dtype=torch.float32)
    names = [name.removesuffix(".weight") for name, weight in model.named_parameters() if "_proj" in name]
    before: dict[str, torch.Tensor] = {}
    for name in names:
        weight = model.get_parameter(f"{name}.weight").data
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))) < 0.4] = 0
        before[name] = weight.clone()
    input = save_model_folder(tmp_path / "pruned", model, plain.run.tokenizer, {"sparse": names}, dtype=torch.float32)
    folder = started(make_context("sparse", kind="qat", input=str(input)), train=train)
    weights, codes = load_file(folder / "model.safetensors"), load_file(folder / "quant/codes.safetensors")
    for name, own in before.items():
        code, weight = codes[f"{name}.codes"], weights[f"{name}.weight"]
        assert not code[own == 0].any() and (code[own != 0] == 0).any()
        if train == "scales":
            assert torch.equal(weight, load_quant_state(folder).dequantized(name))
            continue
        assert torch.equal(weight == 0, own == 0)
        scale = codes[f"{name}.scale"].repeat_interleave(16, 1)
        assert torch.equal((weight / scale).round().clamp(WEIGHTS.qmin, WEIGHTS.qmax), code.float())


def test_what_stands_for_start() -> None:
    assert QatSettings(steps=1).first == "gptq" == QatSettings(steps=1, train="scales").first
    assert QatSettings(steps=1, scales="absmax").first == "rtn"
    for shy in ({"delay": 0.1}, {"anneal_from": 8}, {"lora": 4}):
        assert QatSettings(steps=1, **shy).first == "mse"  # pyright: ignore[reportArgumentType]
    assert QatSettings(steps=1, lora=4, start="rtn").first == "rtn"


def test_an_input_with_codes_of_the_same_scheme_keeps_them(make_context: Callable[..., StageContext]) -> None:
    codes = started(make_context("first", kind="qat"))
    again = make_context("second", kind="qat", input=str(codes))
    assert not started(again).exists()
    settings = QatSettings(weights=WEIGHTS, steps=1, learning_rate=1e-12, scale_learning_rate=1e-12)
    qat.finish(settings, again, qat.train(settings, again))
    first, second = load_quant_state(codes), load_quant_state(again.model)
    # the scales move by less than the grid is wide
    assert all(torch.equal(first.codes[name], second.codes[name]) for name in first.modules)
    assert all(torch.equal(first.scales[name], second.scales[name]) for name in first.modules)


def test_annealed_bits_end_with_ternary_codes(make_context: Callable[..., StageContext]) -> None:
    context = make_context("ternary", kind="qat")
    settings = QatSettings(weights=QuantSpec(ternary=True, group_size=16), steps=4, anneal_from=4)
    qat.start(settings, context)
    qat.finish(settings, context, qat.train(settings, context))
    state = load_quant_state(context.model)
    assert state.spec == settings.weights
    assert {code for codes in state.codes.values() for code in codes.unique().tolist()} == {-1, 0, 1}


@pytest.mark.parametrize(
    "changes", [{"weights": QuantSpec(bits=4, group_size=16)}, {"skip": ("*.0.*",)}, {"activations": ActivationSpec()}]
)
def test_codes_of_another_scheme_are_rounded_again(make_context: Callable[..., StageContext], changes: dict[str, Any]) -> None:
    codes = started(make_context("first", kind="qat"))
    context = make_context("second", kind="qat", input=str(codes))
    qat.start(QatSettings(**{"weights": WEIGHTS, "steps": 1, **changes}), context)
    assert (context.folder / "start").exists()
