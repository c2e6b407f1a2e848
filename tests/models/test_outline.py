"""An outline has the names, order and shapes of the model that transformers builds; what is unusual is left to transformers."""

from typing import Any

import pytest
from transformers import AutoConfig

from decoct.configs.architectures import architecture, names
from decoct.models.common.errors import UserError
from decoct.models.folder.meta import meta_model
from decoct.models.outline import has_outline, outline_of, outlined

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def check_same(config: Any) -> None:
    """Everything that a plan reads of a model is the same of both, in the same order."""
    assert has_outline(config)
    found, real = outline_of(config), outlined(meta_model(config))
    assert found == real
    assert (list(found.tensors), list(found.linears)) == (list(real.tensors), list(real.linears))
    assert list(found.family.weights.linears) == list(real.family.weights.linears)


@pytest.mark.parametrize("name", names())
def test_stored_architectures(name: str) -> None:
    check_same(AutoConfig.for_model(**architecture(name)))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 20}],
    ids=str,
)
def test_every_option_that_adds_or_shapes_a_parameter(kind: str, options: dict[str, Any]) -> None:
    check_same(AutoConfig.for_model(kind, **SIZES, **options))


@pytest.mark.parametrize(
    "options",
    [{"pad_token_id": 97}, {"hidden_act": "gelu_of_tomorrow"}, {"hidden_act": "gelu"}, {"layer_types": ["full_attention"] * 2}],
    ids=str,
)
def test_what_is_unusual_is_left_to_transformers(options: dict[str, Any]) -> None:
    try:
        config = AutoConfig.for_model("qwen3", **{**SIZES, **options})
    except Exception:  # transformers has refused the config itself
        return
    assert not has_outline(config)


def test_an_error_of_transformers_is_told_as_before() -> None:
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        outline_of(AutoConfig.for_model("llama", **{**SIZES, "pad_token_id": 97}))


def test_other_families_are_built_by_transformers() -> None:
    config = AutoConfig.for_model("gemma2", **SIZES, head_dim=16)
    assert not has_outline(config)
    assert outline_of(config) == outlined(meta_model(config))
