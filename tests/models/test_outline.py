"""An outline has the modules, names, order and shapes that transformers builds; what is unusual is left to transformers."""

from typing import Any

import pytest
from transformers import AutoConfig

from decoct.configs.architectures import architecture, names
from decoct.models.capabilities import capabilities
from decoct.models.common.errors import UserError
from decoct.models.dimensions import dimensions
from decoct.models.families import FAMILIES, backbone_and_head, decoder_linears, is_plain_linear, layers_prefix
from decoct.models.folder.meta import meta_model
from decoct.models.outline import Outline, has_outline, outline_of
from decoct.qat.layers.targets import is_tied

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def check_same(config: Any) -> None:
    """Everything that a plan reads of a model is the same of both."""
    outline, real = outline_of(config), meta_model(config)
    assert isinstance(outline, Outline)
    for one, other in zip(outline.named_parameters(), real.named_parameters(), strict=True):
        assert (one[0], one[1].shape, one[1].device) == (other[0], other[1].shape, other[1].device)
    linears, expected = decoder_linears(outline), decoder_linears(real)
    assert list(linears) == list(expected)
    assert all(is_plain_linear(linear) for linear in linears.values())
    shapes = [[(linear.in_features, linear.out_features) for linear in found.values()] for found in (linears, expected)]
    assert shapes[0] == shapes[1]
    assert layers_prefix(outline) == layers_prefix(real)
    assert is_tied(outline) == is_tied(real)
    assert dimensions(outline) == dimensions(real)
    assert capabilities(outline) == capabilities(real)
    assert backbone_and_head(outline)[1].shape == backbone_and_head(real)[1].shape
    assert len(list(outline.base_model.parameters())) == len(list(real.base_model.parameters()))


@pytest.mark.parametrize("name", names())
def test_stored_architectures(name: str) -> None:
    check_same(AutoConfig.for_model(**architecture(name)))


@pytest.mark.parametrize("kind", FAMILIES)
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
    assert not isinstance(outline_of(config), Outline)
