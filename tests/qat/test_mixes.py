"""The mixtures of llama.cpp: the types that its quantizer gives well-known models, and what users change in them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import plan
from decoct.launch.plan.plan_types import Plan
from decoct.launch.plan.problems import problems
from decoct.models.common.errors import UserError
from decoct.qat.layers.quantized_model import fold, prepare, quantize_model
from decoct.qat.layers.targets import targets
from decoct.qat.mixes import MIXES, Shapes, found_mix, mix_of_linears
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.trainer.settings_quantization import QatSettings, QuantizeSettings

Build = Callable[..., PreTrainedModel]


def shapes(layers: int = 32, hidden: int = 4096, ffn: int = 11008, sharing: int = 1) -> Shapes:
    """Those of a Llama; the defaults are Llama 2 7B's."""
    small = hidden // sharing
    one = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (small, hidden), "self_attn.v_proj": (small, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}": size for layer in range(layers) for name, size in one.items()}


def scheme(mix: Any, **more: Any) -> QuantScheme:
    return QuantScheme(mix=mix, weights=QuantSpec(kind=MIXES[mix].most), **more)


@pytest.mark.parametrize(
    ("mix", "sharing", "counts"),
    [
        # the table that llama.cpp prints when it loads such a file of Llama 2 7B, or of Mistral 7B with 4 heads that share one
        ("q4_k_m", 1, {"q4_k": 193, "q6_k": 33}),
        ("q5_k_m", 1, {"q5_k": 193, "q6_k": 33}),
        ("q4_k_s", 1, {"q4_k": 217, "q5_k": 8, "q6_k": 1}),
        ("q3_k_m", 1, {"q3_k": 129, "q4_k": 92, "q5_k": 4, "q6_k": 1}),
        ("q3_k_l", 1, {"q3_k": 129, "q5_k": 96, "q6_k": 1}),
        ("q2_k", 4, {"q2_k": 129, "q3_k": 64, "q4_k": 32, "q6_k": 1}),
        ("q2_k", 2, {"q2_k": 129, "q3_k": 96, "q6_k": 1}),
        ("q3_k_s", 1, {"q3_k": 225, "q6_k": 1}),
        ("q5_k_s", 1, {"q5_k": 225, "q6_k": 1}),
        ("q6_k", 1, {"q6_k": 226}),
    ],
)
def test_models_get_the_types_that_llama_cpp_gives_them(mix: str, sharing: int, counts: dict[str, int]) -> None:
    made = scheme(mix)
    specs = [*made.of_linears(shapes(sharing=sharing)).values(), *made.of_ends(4096, "embed", "head").values()]
    assert Counter(spec.kind for spec in specs) == counts


def test_more_bits_go_to_the_ends_and_every_third_layer() -> None:
    found = mix_of_linears("q4_k_m", shapes(24))
    wide = [name.split(".")[2] for name, spec in found.items() if spec.kind == "q6_k" and name.endswith("down_proj")]
    # the first three, the last three, and of those between every third
    assert list(map(int, wide)) == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    values = [name.split(".")[2] for name, spec in found.items() if spec.kind == "q6_k" and name.endswith("v_proj")]
    assert values == wide


def test_values_of_80_layers_with_shared_heads_get_five_bits() -> None:
    for sharing, expected in ((8, {"q5_k", "q6_k"}), (1, {"q4_k", "q6_k"})):
        found = mix_of_linears("q4_k_m", shapes(80, sharing=sharing))
        assert {spec.kind for name, spec in found.items() if name.endswith("v_proj")} == expected


def test_other_widths_get_blocks_of_32() -> None:
    """SmolLM2-135M: 576 hidden, 1,536 FFN."""
    found = mix_of_linears("q4_k_m", shapes(30, 576, 1536, 3))
    kinds = {name.rpartition(".")[2]: set[str]() for name in found}
    for name, spec in found.items():
        kinds[name.rpartition(".")[2]].add(spec.words())
    assert kinds["q_proj"] == kinds["o_proj"] == kinds["up_proj"] == {"5 bits in groups of 32"}
    assert kinds["v_proj"] == {"5 bits in groups of 32", "8 bits in groups of 32"}
    assert kinds["down_proj"] == {"q4_k", "q6_k"}
    ends = scheme("q4_k_m").of_ends(576, "embed", "")
    assert {key: spec.words() for key, spec in ends.items()} == {"embedding": "8 bits in groups of 32"}


def test_the_head_and_what_is_tied_to_it_get_six_bits() -> None:
    made = scheme("q4_k_m")
    assert {key: spec.kind for key, spec in made.of_ends(256, "embed", "").items()} == {"embedding": "q6_k"}
    assert {key: spec.kind for key, spec in made.of_ends(256, "embed", "head").items()} == {"embedding": "q4_k", "head": "q6_k"}


def test_single_matrices_can_be_changed_or_left_out() -> None:
    changed = scheme(
        "q4_k_m", overrides={"*.0.*.down_proj": SpecChange(kind="q5_k")}, skip=("*.1.self_attn.*", "embed"), head=SpecChange(kind="q5_k")
    )
    found, usual = changed.of_linears(shapes()), scheme("q4_k_m").of_linears(shapes())
    assert {name for name in usual if name not in found} == {name for name in usual if ".1.self_attn." in name}
    differ = {name: found[name].kind for name in found if found[name] != usual[name]}
    assert differ == {"model.layers.0.mlp.down_proj": "q5_k"}
    assert {key: spec.kind for key, spec in changed.of_ends(4096, "embed", "head").items()} == {"head": "q5_k"}


@pytest.mark.parametrize("mix", MIXES)
def test_a_mixture_is_recognized_by_its_matrices(mix: str) -> None:
    for size in (shapes(sharing=4), shapes(30, 576, 1536, 4)):
        assert found_mix(mix_of_linears(mix, size), size) == mix
    changed = mix_of_linears(mix, shapes()) | {"model.layers.7.mlp.up_proj": QuantSpec(bits=4, group_size=32)}
    assert found_mix(changed, shapes()) is None
    # one block type for all is no mixture, even where the mixture of such narrow matrices would have no other
    narrow = shapes(2, 32, 64)
    assert found_mix(mix_of_linears(mix, narrow), narrow) is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_trains_with_a_mixture_ends_with_it(random_model: Build, tied: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 288, "num_hidden_layers": 2, "vocab_size": 64}
    model, made = random_model("llama", tie_word_embeddings=tied, **sizes), scheme("q4_k_m")
    plain = {name: target.spec for name, target in targets(model, made).items()}
    assert len(plain) == 2 * 7 + (1 if tied else 2)
    names = prepare(model, made)
    state = quantize_model(model, made)
    assert {name: state.spec_of(name) for name in state.modules} == plain
    assert list(state.modules) == names
    fold(model, state)


def test_an_embedding_of_another_kind_can_be_left_out(random_model: Build) -> None:
    model = random_model("llama", tie_word_embeddings=False, num_hidden_layers=1)
    model.model.embed_tokens = Other()
    with pytest.raises(UserError, match=r"embedding: the model has no plain embedding to quantize; add model\.embed_tokens to skip"):
        targets(model, scheme("q4_k_m"))


class Other(torch.nn.Module):
    weight = torch.zeros(64, 32)


@pytest.mark.parametrize("settings", [QuantizeSettings, QatSettings])
def test_weights_beside_a_mixture_are_refused(settings: Callable[..., Any]) -> None:
    more: dict[str, Any] = {"tokens": 1000} if settings is QatSettings else {}
    made = settings(mix="q3_k_m", **more)
    assert made.weights == QuantSpec(kind="q3_k")
    assert made.scheme.mix == "q3_k_m"
    with pytest.raises(
        ValueError, match="weights have no effect with mix='q4_k_m', which chooses the kind of each matrix; leave weights out"
    ):
        settings(mix="q4_k_m", weights=QuantSpec(kind="q5_k"), **more)
    with pytest.raises(ValueError, match="mix rounds embedding and head, and activations are inputs"):
        settings(mix="q4_k_m", activations=ActivationSpec(), **more)
    with pytest.raises(ValueError, match="mix='q4_k' is not one of q2_k, q3_k_s"):
        settings(mix="q4_k", **more)


def test_a_plan_counts_the_matrices_and_names_the_mixture_in_remedies() -> None:
    def planned(formats: list[str]) -> Plan:
        data, student = {"builtin": "python-stdlib", "seq_length": 512}, {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
        stages: list[Any] = [{"quantize": {"mix": "q4_k_m"}}, {"export": {"formats": formats}}]
        return plan(recipe_from_dict({"name": "x", "student": student, "data": data, "stages": stages}))

    made = planned(["gguf"])
    assert not problems(made)
    values = {value.key: value for value in made.stages[0].values}
    counted = values["stages.0.quantize.mix matrices"]
    assert counted.value == "166 in 5 bits in groups of 32, 16 in q4_k, 15 in 8 bits in groups of 32, 14 in q6_k"
    assert values["stages.0.quantize.mix"].value == "q4_k_m"
    assert not any(".weights." in key for key in values)
    refused = "\n".join(problems(planned(["compressed-tensors"])))
    assert "stages.quantize.weights.kind=int stages.quantize.weights.group_size=128 in place of stages.quantize.mix" in refused
    assert "unquantized embedding; leave stages.quantize.mix out" in refused
