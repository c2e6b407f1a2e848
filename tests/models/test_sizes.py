"""Which shapes a model can be cut to: sizes, what follows from them, and a remedy that works for each refusal."""

import re
from typing import Any

import pytest
from transformers import AutoConfig

from decoct.models.axis_map import Axis
from decoct.models.common.errors import UserError
from decoct.models.family_map import FAMILIES
from decoct.models.kept_layers import cut_config, kept_layers
from decoct.models.sizes import Sizes, sizes_of, target_sizes

from ..support.pruned_families import CONFIGS, LAYERS

_SIZES = Sizes(ffn=20, heads=6, kv_heads=2, hidden=24, layers=4, head_dim=4)
Wanted = dict[Axis, int]


def config_of(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes})


def target(kind: str, wanted: Wanted, **changes: Any) -> Sizes:
    return target_sizes(config_of(kind, **changes), FAMILIES[kind], wanted)


@pytest.mark.parametrize("kind", CONFIGS)
def test_sizes_of_every_family(kind: str) -> None:
    keys = 6 if kind in ("gpt2", "opt") else 2
    assert sizes_of(config_of(kind), FAMILIES[kind]) == Sizes(ffn=20, heads=6, kv_heads=keys, hidden=24, layers=4, head_dim=4)


def test_sizes_that_a_config_leaves_out() -> None:
    assert sizes_of(AutoConfig.for_model("gpt2", n_embd=24, n_head=6), FAMILIES["gpt2"]).ffn == 96
    # a stale head_dim in a GPT-2 config is read by nobody
    assert sizes_of(AutoConfig.for_model("gpt2", n_embd=24, n_head=6, head_dim=99), FAMILIES["gpt2"]).head_dim == 4
    assert sizes_of(AutoConfig.for_model("qwen2", hidden_size=24, num_attention_heads=6), FAMILIES["qwen2"]).head_dim == 4
    assert sizes_of(AutoConfig.for_model("qwen3", hidden_size=24, num_attention_heads=6), FAMILIES["qwen3"]).head_dim == 128


@pytest.mark.parametrize(
    ("kind", "wanted", "changed"),
    [
        ("mistral", {"ffn": 7}, {"ffn": 7}),
        ("mistral", {"heads": 4}, {"heads": 4}),
        ("mistral", {"kv_heads": 1}, {"heads": 3, "kv_heads": 1}),
        ("mistral", {"kv_heads": 1, "heads": 2}, {"heads": 2, "kv_heads": 1}),
        ("mistral", {"hidden": 23}, {"hidden": 23}),
        ("llama", {"hidden": 18, "layers": 2}, {"hidden": 18, "layers": 2}),
        ("opt", {"heads": 5, "hidden": 20}, {"heads": 5, "kv_heads": 5, "hidden": 20}),
        # one axis may stay whole beside another
        ("qwen3", {"ffn": 20, "heads": 2}, {"heads": 2}),
    ],
)
def test_what_follows_from_what_is_kept(kind: str, wanted: Wanted, changed: dict[str, int]) -> None:
    keys = {"kv_heads": 6} if kind == "opt" else {}
    assert target(kind, wanted) == Sizes(**{**_SIZES.record(), **keys, **changed})


def test_heads_with_keys_of_their_own_go_together() -> None:
    made = target("mistral", {"heads": 3}, num_key_value_heads=6)
    assert (made.heads, made.kv_heads, made.group) == (3, 3, 1)


@pytest.mark.parametrize(
    ("kind", "wanted", "changes", "message", "remedy"),
    [
        ("llama", {"ffn": 21}, {}, "structured.ffn=21 keeps more FFN channels than the student's 20; give at most 20", None),
        ("llama", {"layers": 5}, {}, "structured.layers=5 keeps more layers than the student's 4; give at most 4", None),
        ("llama", {"ffn": 0}, {}, "structured.ffn=0 would remove all FFN channels; give at least 1", None),
        ("llama", {"ffn": 20}, {}, "structured.ffn=20 keeps all FFN channels, so that nothing is pruned; give fewer", None),
        (
            "llama",
            {"ffn": 20, "heads": 6},
            {},
            "structured.ffn=20 and structured.heads=6 keep all FFN channels and query heads, so that nothing is pruned; give fewer",
            None,
        ),
        ("llama", {"layers": 1}, {}, "structured.layers=1: the first and the last layer are always kept; give 2 to 4", {"layers": 2}),
        (
            "mistral",
            {"heads": 5},
            {},
            "structured.heads=5 does not go with the model's 2 key/value heads: every key/value head keeps the same number of query heads, "
            "at most 3; give heads 2 or 4 or 6, or fewer kv_heads",
            {"heads": 4},
        ),
        (
            "mistral",
            {"heads": 4, "kv_heads": 1},
            {},
            "structured.heads=4 does not go with structured.kv_heads=1: every key/value head keeps the same number of query heads, at most "
            "3; give heads 1 or 2 or 3, or fewer kv_heads",
            {"heads": 3, "kv_heads": 1},
        ),
        (
            "llama",
            {"hidden": 20},
            {},
            "structured.hidden=20: transformers takes no llama whose hidden size (20) is not a multiple of its query heads (6); give "
            "structured.hidden=18 or 24, or other heads",
            {"hidden": 18},
        ),
        (
            "gemma2",
            {"hidden": 14, "heads": 4},
            {},
            "structured.heads=4 structured.hidden=14: transformers takes no gemma2 whose hidden size (14) is not a multiple of its query "
            "heads (4); give structured.hidden=12 or 16, or other heads",
            {"hidden": 16, "heads": 4},
        ),
        (
            "gpt2",
            {"heads": 3},
            {},
            "structured.heads=3: gpt2 has no head_dim of its own, it is hidden / heads (4); cut both together, such as structured.heads=3 "
            "structured.hidden=12, or neither",
            {"heads": 3, "hidden": 12},
        ),
        (
            "opt",
            {"hidden": 12},
            {},
            "structured.hidden=12: opt has no head_dim of its own, it is hidden / heads (4); cut both together, such as structured.heads=6 "
            "structured.hidden=24, or neither",
            None,
        ),
        (
            "opt",
            {"hidden": 12, "heads": 3},
            {"word_embed_proj_dim": 16},
            "structured.heads=3 structured.hidden=12: this opt has an embedding of 16 channels beside hidden states of 24 "
            "(word_embed_proj_dim), which decoct does not cut; prune 'ffn' and 'layers' alone",
            {"ffn": 3, "layers": 2},
        ),
        (
            "gpt2",
            {"layers": 2},
            {"scale_attn_by_inverse_layer_idx": True},
            "structured.layers=2: the model divides each layer's attention by the layer's number (scale_attn_by_inverse_layer_idx), which "
            "would change; leave 'layers' out",
            {"ffn": 3},
        ),
    ],
)  # fmt: skip
def test_shapes_that_no_model_has_are_refused_with_one_that_has(
    kind: str, wanted: Wanted, changes: dict[str, Any], message: str, remedy: Wanted | None
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        target(kind, wanted, **changes)
    if remedy:
        target(kind, remedy, **changes)


def test_longrope_factors_bind_hidden_to_heads() -> None:
    rotary = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(UserError, match=r"longrope .* while hidden / heads is head_dim \(4\); .* structured.heads=4 structured.hidden=16"):
        target("phi3", {"heads": 4}, rope_parameters=rotary)
    target("phi3", {"heads": 4, "hidden": 16}, rope_parameters=rotary)


def test_layers_of_different_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"per_layer_config \(layers of different shapes\); structured pruning needs equal layers"):
        target("llama", {"ffn": 4}, per_layer_config={2: {"num_key_value_heads": 1}})


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cut_config_states_the_target_and_survives_its_file(kind: str) -> None:
    source, family = config_of(kind), FAMILIES[kind]
    before = source.to_dict()
    wanted: Wanted = (
        {"ffn": 7, "heads": 3, "hidden": 12, "layers": 3}
        if not family.own_head_dim
        else {"ffn": 7, "kv_heads": 1, "hidden": 12, "layers": 3}
    )
    after = target_sizes(source, family, wanted)
    made = cut_config(source, family, after, kept_layers(LAYERS, 3))
    assert source.to_dict() == before
    read = type(source).from_dict(made.to_dict())
    assert sizes_of(read, family) == after
    if family.own_head_dim:
        assert made.to_dict()["head_dim"] == 4
