"""nvfp4: parts of a matrix that servers join have one global scale, in training, when rounded at once and when rounded layer by layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from decoct.models.fused_linears import joined
from decoct.qat.codes.state import QuantState
from decoct.qat.fake_quant.float_reference import global_scale
from decoct.qat.layers.quantized_model import fold, prepare, quantize_model
from decoct.qat.ptq import RoundingMethod, round_model
from decoct.qat.spec import QuantSpec

NVFP4 = QuantSpec(kind="nvfp4", group_size=16)
ATTENTION, MLP = "model.layers.1.self_attn.", "model.layers.1.mlp."


def _check(state: QuantState, model: PreTrainedModel) -> None:
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in state.modules}
    for names in joined(state.modules):
        largest = torch.stack([weights[name].abs().amax() for name in names]).amax().view(1)
        for name in names:
            assert torch.equal(state.global_scales[name], global_scale(largest)), name
    assert {len(names) for names in joined(state.modules)} == {1, 2, 3}


def _uneven(random_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = random_model("llama")
    for name, factor in ((f"{ATTENTION}k_proj", 3.0), (f"{MLP}up_proj", 0.25)):
        model.get_parameter(f"{name}.weight").data.mul_(factor)
    return model


def test_names_are_grouped_by_their_block() -> None:
    names = ["a.q_proj", "a.k_proj", "a.o_proj", "b.q_proj", "m.up_proj", "m.gate_proj", "lm_head"]
    assert joined(names) == [("a.q_proj", "a.k_proj"), ("a.o_proj",), ("b.q_proj",), ("m.up_proj", "m.gate_proj"), ("lm_head",)]


@pytest.mark.parametrize("method", ["at once", "by layers", "prepared"])
def test_joined_parts_share_their_global_scale(random_model: Callable[..., PreTrainedModel], method: str) -> None:
    model, plain = _uneven(random_model), _uneven(random_model)
    if method == "by layers":
        state = round_model(model, NVFP4, RoundingMethod()).state
    else:
        if method == "prepared":
            prepare(model, NVFP4)
        state = quantize_model(model, NVFP4)
    _check(state, plain)


def test_a_folded_model_has_the_prepared_logits(random_model: Callable[..., PreTrainedModel]) -> None:
    model: Any = _uneven(random_model)
    prepare(model, NVFP4)
    tokens = torch.arange(12)[None]
    before = model(input_ids=tokens).logits
    before.sum().backward()
    assert all(model.get_parameter(f"{ATTENTION}{part}_proj.weight").grad is not None for part in "qkvo")
    fold(model, quantize_model(model, NVFP4))
    assert torch.equal(model(input_ids=tokens).logits, before)
