"""FFN channels: sliced equals masked, in memory and reloaded; scores mean what they say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.families import family_of
from decoct.models.pruning import alignment_hint, ffn_channel_scores, prune_ffn

TinyModel = Callable[..., Any]
FAMILIES = {"llama": {"mlp_bias": True}, "mistral": {}, "qwen2": {}, "qwen3": {"attention_bias": True}}
IDS = torch.arange(20).reshape(2, 10)


def _masked_logits(model: Any, kept: dict[str, list[int]]) -> torch.Tensor:
    """Logits with the activations of all other channels set to zero: the definition of the pruned model."""
    handles = []
    for name, indices in kept.items():
        mask = torch.zeros(model.config.intermediate_size)
        mask[indices] = 1
        down = model.get_submodule(f"{name}.down_proj")
        handles.append(down.register_forward_pre_hook(lambda _m, args, mask=mask: (args[0] * mask.to(args[0].dtype),)))
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_sliced_equals_masked_also_after_save_and_reload(
    tiny_model: TinyModel, tmp_path: Path, model_type: str, dtype: torch.dtype, tolerance: float
) -> None:
    dense, model = (tiny_model(model_type, dtype=dtype, **FAMILIES[model_type]) for _ in range(2))
    kept = prune_ffn(model, ffn_channel_scores(model, [{"input_ids": IDS}]), 20)
    expected = _masked_logits(dense, kept)
    with torch.no_grad():
        dense_logits = dense(input_ids=IDS).logits
        logits = model(input_ids=IDS).logits
    assert (dense_logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)

    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    reloaded, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reloaded.config.intermediate_size == 20
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=IDS).logits, logits)


def test_config_changes_in_the_ffn_width_alone(tiny_model: TinyModel) -> None:
    dense, model = tiny_model("qwen2"), tiny_model("qwen2")
    prune_ffn(model, [torch.arange(48.0)] * 4, 20)
    before, after = dense.config.to_dict(), model.config.to_dict()
    assert {key for key in before if before[key] != after[key]} == {"intermediate_size"}
    assert dense.num_parameters() - model.num_parameters() == 4 * 3 * 32 * (48 - 20)
    mlp = model.get_submodule("model.layers.3.mlp")
    assert (mlp.intermediate_size, mlp.gate_proj.out_features, mlp.down_proj.in_features) == (20, 20, 20)


def test_best_channels_stay_in_order_and_ties_go_to_the_first(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    scores = [torch.ones(48) for _ in range(4)]
    scores[1][[40, 7]] = 2.0
    kept = prune_ffn(model, scores, 5)
    assert kept["model.layers.0.mlp"] == [0, 1, 2, 3, 4]
    assert kept["model.layers.1.mlp"] == [0, 1, 2, 7, 40]


def test_keeping_all_channels_changes_nothing(tiny_model: TinyModel) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    prune_ffn(model, [torch.randn(48) for _ in range(4)], 48)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))


def test_scores_are_column_norm_times_mean_activation_of_unmasked_tokens(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    seen: list[torch.Tensor] = []
    down = family_of(model).linear(family_of(model).layers(model)[2], "mlp.down_proj")
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    scores = ffn_channel_scores(model, [{"input_ids": IDS, "attention_mask": mask}])
    handle.remove()
    mean = (seen[0].abs() * mask[..., None]).sum((0, 1)) / mask.sum()
    torch.testing.assert_close(scores[2], down.weight.detach().norm(dim=0) * mean)
    assert scores[2].dtype == torch.float32
    assert not down._forward_pre_hooks


def test_scores_depend_neither_on_batching_nor_on_padding(tiny_model: TinyModel) -> None:
    model = tiny_model("qwen3").train()
    padded = torch.cat([IDS, torch.full((2, 3), 5)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 3, dtype=torch.int64)], 1)
    whole = ffn_channel_scores(model, [{"input_ids": IDS}])
    split = ffn_channel_scores(model, iter([{"input_ids": padded[:1], "attention_mask": mask[:1]}, {"input_ids": IDS[1:]}]))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert model.training


def test_pruning_by_score_loses_less_than_pruning_the_best(tiny_model: TinyModel) -> None:
    dense, good, bad = (tiny_model("llama") for _ in range(3))
    scores = ffn_channel_scores(dense, [{"input_ids": IDS}])
    prune_ffn(good, scores, 32)
    prune_ffn(bad, [-score for score in scores], 32)
    with torch.no_grad():
        target, near, far = (model(input_ids=IDS).logits for model in (dense, good, bad))
    assert (near - target).norm() < 0.7 * (far - target).norm()


@pytest.mark.parametrize("keep", [0, 49, -1])
def test_impossible_width_names_the_recipe_key(tiny_model: TinyModel, keep: int) -> None:
    with pytest.raises(UserError, match=rf"prune.structured.ffn={keep} is outside 1..48"):
        prune_ffn(tiny_model("llama"), [torch.ones(48)] * 4, keep)


def test_scores_of_another_model_are_refused_before_anything_is_cut(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="do not fit 4 layers of 48 channels"):
        prune_ffn(model, [torch.ones(48)] * 3 + [torch.ones(47)], 20)
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.shape == (48, 32)


def test_other_families_are_refused() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        ffn_channel_scores(model, [])
    with pytest.raises(UserError, match="'gpt2'"):
        prune_ffn(model, [], 1)


def test_no_token_and_broken_weights_are_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="no token"):
        ffn_channel_scores(model, [{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}])
    torch.nn.init.constant_(model.get_submodule("model.layers.1.mlp.down_proj").weight, float("nan"))
    with pytest.raises(NonFiniteError, match="layer 1"):
        ffn_channel_scores(model, [{"input_ids": IDS}])


def test_alignment_hint_names_the_neighbours() -> None:
    assert alignment_hint(6144) is None
    assert "6016 or 6144" in str(alignment_hint(6100))
    assert "use 128" in str(alignment_hint(100))
