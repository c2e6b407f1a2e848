"""Hidden states, queries, keys and values are read from any family whose layers return one state per token; others are refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from decoct.models.common.errors import UserError
from decoct.models.hidden_states import check_layers, seen_inside, vector_width

TinyModel = Callable[..., Any]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2", "olmo2"])
def test_states_are_transformers_own(tiny_model: TinyModel, model_type: str) -> None:
    model = tiny_model(model_type)
    last = len(model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h) - 1
    check_layers(model, "the student", range(last + 1))
    assert not any(module._forward_hooks for module in model.modules()), "nothing is left behind"
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad(), seen_inside(model, range(last + 1)) as seen:
        # transformers' own recording leaves hooks in the model
        known = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    # the last of transformers' states has passed the final norm
    for index in range(last):
        assert torch.equal(seen.hidden[index], known[index + 1]), index
    assert seen.hidden[last].shape == known[-1].shape


def test_vectors_are_what_the_projections_compute(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    check_layers(model, "the student", [], [(1, "q"), (1, "k"), (2, "v")])
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad(), seen_inside(model, [0, 1], [(1, "k"), (2, "v")]) as seen:
        model.model(input_ids=ids, use_cache=False)
        block = model.model.layers[1]
        expected = block.self_attn.k_proj(block.input_layernorm(seen.hidden[0]))
    torch.testing.assert_close(seen.vectors[1, "k"], expected)
    assert seen.vectors.keys() == {(1, "k"), (2, "v")}
    assert vector_width(model, 1, "k") == expected.shape[-1] < vector_width(model, 1, "q")


@pytest.mark.parametrize("model_type", ["gpt2", "phi3"])
def test_attention_with_one_matrix_for_all_three_is_refused(tiny_model: TinyModel, model_type: str) -> None:
    with pytest.raises(UserError, match=rf"the teacher \(model type '{model_type}'\): layer 0 has no q_proj.*use features: {{hidden"):
        check_layers(tiny_model(model_type), "the teacher", [], [(0, "q")])


class _Odd(nn.Module):
    """A layer that returns something else than one state per token."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, states: torch.Tensor, **given: Any) -> torch.Tensor:
        """Twice as many rows for the hook, and what the next layer needs by its first half."""
        return torch.cat([self.inner(states[:1], **given)] * 2)


def test_layers_that_return_something_else_are_refused_by_name(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.model.layers[3] = _Odd(model.model.layers[3])
    check_layers(model, "the student", [0, 2])
    with pytest.raises(
        UserError, match=r"the student \(model type 'llama'\): layer 3 returns \(2, 4, 32\) for four tokens, not one hidden"
    ):
        check_layers(model, "the student", [3])


def test_a_layer_that_runs_twice_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(UserError, match="in 2 runs, not one hidden state"):
        check_layers(model, "the student", [1])


def test_an_empty_model_is_not_run() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
        )
    check_layers(model, "the student", [0, 1], [(1, "v")])
