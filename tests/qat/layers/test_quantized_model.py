"""Quantized linears inside real models: prepare, train, quantize, fold."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from decoct.models.common.errors import UserError
from decoct.qat.fake_quant import fake_quant
from decoct.qat.layers.quantized_model import QuantLinear, fold, hold_codes, prepare, quantize_model
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=4, group_size=16)
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
IDS = torch.arange(20).remainder(64).view(2, 10)


def tiny(kind: type = LlamaConfig, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(SHAPE | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


def linears(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def test_prepare_replaces_decoder_linears_and_nothing_else() -> None:
    model = tiny()
    before = dict(model.named_parameters(remove_duplicate=False))
    keys = list(model.state_dict())
    random_state = torch.get_rng_state()
    names = prepare(model, SPEC)
    assert names == linears(model)
    assert len(names) == 2 * 7
    assert [name for name, module in model.named_modules() if isinstance(module, QuantLinear)] == names
    assert type(model.get_submodule("lm_head")) is nn.Linear
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training


def test_codes_that_are_held_are_taken_out_and_folded_as_they_are() -> None:
    model = tiny()
    state = quantize_model(model, SPEC, skip=["*.up_proj"])
    hold_codes(model, state)
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {"scale"}
    held = logits(model)
    with pytest.raises(UserError, match="other modules than skip"):
        quantize_model(model, SPEC, skip=["*.down_proj"])
    again = quantize_model(model, SPEC, skip=["*.up_proj"])
    assert again.hash() == state.hash()
    fold(model, again)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in state.modules)
    assert torch.equal(logits(model), held)


def test_forward_uses_the_rounded_weight_in_training_and_evaluation() -> None:
    model, reference = tiny(), tiny()
    with torch.no_grad():
        for name in linears(reference):
            weight = reference.get_parameter(f"{name}.weight")
            weight.copy_(fake_quant(weight, SPEC))
    plain = logits(model)
    prepare(model, SPEC)
    assert torch.equal(logits(model), logits(reference))
    assert torch.equal(logits(model.train()), logits(reference.train()))
    assert not torch.allclose(logits(model), plain, atol=1e-3)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("tied", [False, True])
def test_fold_gives_exactly_the_prepared_logits(kind: type, tied: bool) -> None:
    model = tiny(kind, tie_word_embeddings=tied)
    keys = list(model.state_dict())
    prepare(model, SPEC)
    for number, module in enumerate(m for m in model.modules() if isinstance(m, QuantLinear)):
        if number % 2:
            module.mask = module.weight > -0.01
    expected = logits(model)
    state = quantize_model(model, SPEC)
    fold(model, state)
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    for name in state.modules:
        assert type(model.get_submodule(name)) is nn.Linear
        weight = model.get_parameter(f"{name}.weight")
        assert weight.requires_grad
        assert torch.equal(weight, state.dequantized(name))
    if tied:
        assert model.get_parameter("lm_head.weight") is model.get_input_embeddings().weight


def test_quantizing_a_plain_model_equals_the_prepared_one() -> None:
    model = tiny()
    plain = quantize_model(model, SPEC)
    prepare(model, SPEC)
    prepared = quantize_model(model, SPEC)
    assert plain.modules == prepared.modules
    assert plain.hash() == prepared.hash()


def test_gradients_reach_kept_weights_only() -> None:
    model = tiny()
    prepare(model, SPEC)
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(module, QuantLinear)
    mask = torch.rand(module.weight.shape) > 0.5
    module.mask = mask
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert module.weight.grad is not None
    assert not module.weight.grad[~mask].any()
    assert (module.weight.grad[mask] != 0).float().mean() > 0.9
    assert not module.quantized_weight()[~mask].any()
    assert "model.layers.1.mlp.down_proj.mask" not in model.state_dict()


def test_checkpointing_autocast_and_copies_keep_the_rounding() -> None:
    model = tiny()
    prepare(model, SPEC)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    again = copy.deepcopy(model)
    again.zero_grad()
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name, parameter in again.named_parameters():
        before, after = expected[name], parameter.grad
        assert before is not None, name
        assert after is not None, name
        assert torch.equal(after, before), name
    module = next(m for m in again.modules() if isinstance(m, QuantLinear))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(3, 32)
        rounded = fake_quant(module.weight, SPEC).bfloat16()
        assert torch.equal(module(x), F.linear(x.bfloat16(), rounded))


def test_skip_leaves_modules_alone() -> None:
    model = tiny()
    names = prepare(model, SPEC, skip=["*.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"])
    assert len(names) == 2 * 7 - 3
    assert type(model.get_submodule("model.layers.1.mlp.down_proj")) is nn.Linear
    assert set(quantize_model(model, SPEC).modules) == set(names)
    assert quantize_model(model, SPEC, skip=["*.down_proj", "*.0.self_attn.q_proj"]).modules == tuple(names)
    with pytest.raises(UserError, match=r"prepared with other modules than skip=\['\*.up_proj'\]"):
        quantize_model(model, SPEC, skip=["*.up_proj"])


@pytest.mark.parametrize("pattern", ["down_proj", "model.layers.0", "*.w2", "model.layers.9.*"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    model = tiny()
    with pytest.raises(UserError, match=r"skip: '.*' matches no linear layer.*'model.layers.0.self_attn.q_proj'"):
        prepare(model, SPEC, skip=["*.up_proj", pattern])
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_a_group_size_that_does_not_divide_names_the_module() -> None:
    model = tiny()
    with pytest.raises(
        UserError, match=r"module model.layers.0.mlp.down_proj: group_size=32 does not divide in_features=48; use 16"
    ) as error:
        prepare(model, QuantSpec(group_size=32))
    assert "skip: ['model.layers.0.mlp.down_proj']" in str(error.value)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert len(prepare(model, QuantSpec(group_size=32), skip=["*.down_proj"])) == 12


def test_twice_prepared_other_spec_and_nothing_left_are_refused() -> None:
    model = tiny()
    with pytest.raises(UserError, match=r"nothing to quantize: skip=\['\*'\] leaves no linear layer"):
        prepare(model, SPEC, skip=["*"])
    prepare(model, SPEC)
    with pytest.raises(UserError, match="quantized already"):
        prepare(model, SPEC)
    with pytest.raises(UserError, match="prepared with another spec"):
        quantize_model(model, QuantSpec(bits=8, group_size=16))


def test_shared_and_foreign_linears_are_refused() -> None:
    model = tiny()
    layers: Any = model.get_submodule("model.layers")
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"shared between model.layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight"):
        prepare(model, SPEC)
    assert len(prepare(model, SPEC, skip=["*.up_proj"])) == 12

    class Special(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = tiny()
    model.set_submodule("model.layers.0.mlp.up_proj", Special(32, 48, bias=False))
    with pytest.raises(UserError, match=r"module model.layers.0.mlp.up_proj is a Special, not a plain nn.Linear"):
        prepare(model, SPEC)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_module(bad: float) -> None:
    model = tiny()
    prepare(model, SPEC)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[5, 17] = bad
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight cannot be quantized: 1 of 96 groups hold NaN .* row 5 group 1"):
        quantize_model(model, SPEC)


def test_fold_refuses_what_it_cannot_do_exactly() -> None:
    model = tiny()
    state = quantize_model(model, SPEC)
    with pytest.raises(UserError, match=r"model.layers.0.mlp.gate_proj is of shape \(64, 32\), but the codes have shape \(48, 32\)"):
        fold(tiny(intermediate_size=64), state)
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.q_proj is missing"):
        fold(tiny(num_hidden_layers=1), state)
    with pytest.raises(UserError, match=r"is torch.bfloat16; .* load the model with dtype=float32"):
        fold(tiny().bfloat16(), state)
    prepare(model, SPEC)
    partial = quantize_model(tiny(), SPEC, skip=["*.down_proj"])
    with pytest.raises(UserError, match=r"module model.layers.0.mlp.down_proj \(2 in all\) is prepared, but the codes do not cover it"):
        fold(model, partial)
    assert len([module for module in model.modules() if isinstance(module, QuantLinear)]) == 14


def test_models_without_memory_can_be_prepared() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    assert len(prepare(model, SPEC)) == 14


def test_the_repr_names_the_lattice() -> None:
    assert "bits=4, group_size=16" in repr(QuantLinear(nn.Linear(32, 4), SPEC))
