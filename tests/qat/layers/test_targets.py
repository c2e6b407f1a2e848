"""Lattices in real models: every kind, embedding and head, tied or not, prepared, quantized, folded, stored and read back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.families import backbone_and_head
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.fused_linears import joined
from decoct.qat.codes.state import load_quant_state
from decoct.qat.fake_quant import fake_quant
from decoct.qat.fake_quant.floats import shared_global_scale
from decoct.qat.layers.quant_linear import Extras, QuantEmbedding, TiedHead
from decoct.qat.layers.quantized_model import fold, prepare, quantize_model
from decoct.qat.layers.targets import targets
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=4, group_size=16)
IDS = torch.arange(20).view(2, 10)
LATTICES = {
    "asymmetric": QuantScheme(weights=QuantSpec(bits=3, group_size=16, symmetric=False)),
    "one scale": QuantScheme(weights=QuantSpec(bits=8, group_size="tensor")),
    "nf4": QuantScheme(weights=QuantSpec(kind="nf4", group_size=16)),
    "fp8": QuantScheme(weights=QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel")),
    "mxfp4": QuantScheme(weights=QuantSpec(kind="mxfp4", group_size=32)),
    "nvfp4": QuantScheme(weights=QuantSpec(kind="nvfp4", group_size=16)),
    "mixed": QuantScheme(
        weights=SPEC,
        overrides={
            "*.down_proj": SpecChange(bits=8, group_size="channel"),
            "*.o_proj": SpecChange(symmetric=False),
            "*.1.*.up_proj": SpecChange(kind="nf4"),
        },
    ),
    "embedding": QuantScheme(weights=SPEC, embedding=SpecChange(bits=8)),
    "head": QuantScheme(weights=SPEC, skip=("*.v_proj",), embedding=SpecChange(kind="nf4"), head=SpecChange(bits=6)),
}


def tiny(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    shape = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | changes)), dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", LATTICES)
def test_prepared_quantized_and_folded_are_one_model(name: str, kind: str) -> None:
    scheme, model = LATTICES[name], tiny(kind)
    by_hand = copy.deepcopy(model)
    # nvfp4: parts that servers join share a global scale
    whole = {
        module: shared_global_scale([(model.get_parameter(f"{one}.weight"), None) for one in names])
        for names in joined(targets(model, scheme))
        for module in names
    }
    for module, target in targets(by_hand, scheme).items():
        weight = by_hand.get_parameter(f"{module}.weight")
        weight.data.copy_(fake_quant(weight.data, target.spec, whole=whole[module] if target.spec.kind == "nvfp4" else None))
    plain = quantize_model(model, scheme)
    keys = list(model.state_dict())
    names = prepare(model, scheme)
    assert torch.equal(logits(model), logits(by_hand)), "the forward rounds each module to its lattice"
    state = quantize_model(model, scheme)
    assert state.hash() == plain.hash() and list(state.modules) == names
    state.check("memory")
    with pytest.raises(UserError, match=r"prepared with (another spec|other modules)"):
        quantize_model(model, QuantScheme(weights=QuantSpec(bits=2, group_size=8)))
    expected = logits(model)
    fold(model, state)
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == keys
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)} == {nn.Linear, nn.Embedding}


@pytest.mark.parametrize("name", LATTICES)
def test_a_folder_holds_every_lattice(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny()
    state = quantize_model(model, LATTICES[name])
    fold(model, state)
    folder = save_model_folder(
        tmp_path / "model", model, tokenizer, {"quant": state.record()}, dtype=torch.float32,
        extra_tensors={"quant/codes.safetensors": state.tensors()},
    )  # fmt: skip
    again = load_quant_state(folder)
    assert again.hash() == state.hash()
    for module in state.modules:
        assert again.spec_of(module) == state.spec_of(module)
        assert torch.equal(again.dequantized(module), model.get_parameter(f"{module}.weight"))
    assert torch.equal(logits(load_model(folder, dtype=torch.float32).eval()), logits(model))


def test_a_tied_table_is_rounded_once_for_both_ends() -> None:
    model, scheme = tiny(tie_word_embeddings=True), LATTICES["embedding"]
    embedding: Any = model.get_input_embeddings()
    table = embedding.weight
    rounded = fake_quant(table, SpecChange(bits=8).applied(SPEC))
    names = prepare(model, scheme, extras=Extras(scale=True))
    assert names[0] == "model.embed_tokens" and "lm_head" not in names
    made: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    assert isinstance(made, QuantEmbedding) and isinstance(head, TiedHead) and head.weight is made.weight is table
    _, weight, _ = backbone_and_head(model)
    assert torch.equal(weight, rounded), "losses take the rounded head"
    assert torch.equal(model.get_input_embeddings()(IDS), rounded[IDS])
    model(input_ids=IDS).logits.sum().backward()
    assert table.grad is not None and made.scale is not None and made.scale.grad is not None
    fold(model, state := quantize_model_with_first_scales(model, scheme))
    assert state.modules[0] == "model.embed_tokens" and "lm_head" not in state.modules
    again: Any = model.get_input_embeddings()
    assert model.get_parameter("lm_head.weight") is again.weight
    assert torch.equal(again.weight, state.dequantized("model.embed_tokens"))


def quantize_model_with_first_scales(model: PreTrainedModel, scheme: QuantScheme) -> Any:
    """A prepared model's codes after its scale parameters got values."""
    from decoct.qat.fake_quant import quantize
    from decoct.qat.layers.quant_linear import RoundedWeight

    for module in model.modules():
        if isinstance(module, RoundedWeight) and module.scale is not None:
            module.scale.data.copy_(quantize(module.weight, module.spec)[1])
    return quantize_model(model, scheme)


@pytest.mark.parametrize("other", ["embedding", "asymmetric"])
def test_another_lattice_or_choice_of_ends_than_prepared_is_refused(other: str) -> None:
    model = tiny()
    prepare(model, QuantScheme(weights=SPEC, embedding=SpecChange(bits=6)))
    asked = LATTICES["embedding"] if other == "embedding" else QuantScheme(weights=SPEC)
    with pytest.raises(UserError, match="another spec" if other == "embedding" else "other modules"):
        quantize_model(model, asked)


def test_a_copy_of_a_model_with_a_tied_head_has_a_head_of_its_own() -> None:
    model = tiny(tie_word_embeddings=True)
    prepare(model, LATTICES["embedding"])
    other = copy.deepcopy(model)
    embedding: Any = other.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.zero_()
    assert not logits(other).any() and logits(model).any()


def test_embedding_and_head_get_no_adapter_and_keep_their_weights() -> None:
    model = tiny()
    prepare(model, LATTICES["head"], extras=Extras(scale=True, rank=2))
    trained = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"scale", "adapter_in", "adapter_out"}
    assert not any(name.startswith(("model.embed_tokens.adapter", "lm_head.adapter")) for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "scheme", "message"),
    [
        ({"tie_word_embeddings": True}, QuantScheme(weights=SPEC, head=SpecChange(bits=8)), "head: the head is tied to the embedding"),
        ({}, QuantScheme(weights=SPEC, skip=("lm_head",), head=SpecChange(bits=8)), "head: skip matches lm_head, which head quantizes"),
        ({}, QuantScheme(weights=SPEC, embedding=SpecChange(group_size=24)), "model.embed_tokens: group_size=24 does not divide"),
        ({}, QuantScheme(weights=SPEC, overrides={"*.gate": SpecChange(bits=8)}), "overrides: '.*gate' matches no linear layer"),
        ({}, QuantScheme(weights=SPEC, skip=("*.gate",)), "skip: '.*gate' matches no linear layer"),
        ({}, QuantScheme(weights=SPEC, skip=("*_proj",)), "there is nothing to quantize"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_model_untouched(changes: dict[str, Any], scheme: QuantScheme, message: str) -> None:
    model = tiny(**changes)
    before = logits(model)
    with pytest.raises(UserError, match=message):
        prepare(model, scheme)
    assert torch.equal(logits(model), before)


def test_an_embedding_that_does_more_than_look_up_is_rounded_but_not_trained() -> None:
    model = tiny("gemma2", tie_word_embeddings=True, head_dim=16, query_pre_attn_scalar=16)
    scheme = LATTICES["embedding"]
    embedding: Any = model.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        model = tiny("gemma3_text", tie_word_embeddings=True, head_dim=16, query_pre_attn_scalar=16)
        embedding = model.get_input_embeddings()
    assert type(embedding) is not nn.Embedding, "a family that scales its embedding"
    with pytest.raises(UserError, match="does more than look rows up"):
        prepare(model, scheme)
    state = quantize_model(model, scheme)
    fold(model, state)
    assert torch.equal(model.get_parameter("lm_head.weight"), state.dequantized("model.embed_tokens"))
    assert type(model.get_input_embeddings()) is type(embedding)
