"""The config of a student that keeps some layers."""

import pytest
from transformers import LlamaConfig, Qwen2Config

from decoct.models.common.errors import UserError
from decoct.models.kept_layers import kept_config


def test_the_config_has_the_depth_that_is_kept_and_the_parent_keeps_its_own() -> None:
    parent = LlamaConfig(num_hidden_layers=6, hidden_size=32, num_attention_heads=4)
    config, kept = kept_config(parent, 3)
    assert kept == [0, 2, 5]
    assert (config.num_hidden_layers, parent.num_hidden_layers) == (3, 6)
    changed = {key for key, value in config.to_dict().items() if value != parent.to_dict()[key]}
    assert changed == {"num_hidden_layers"}


@pytest.mark.parametrize("keep", [2, 4, [1], [2, 4], [0, 1, 5]])
def test_lists_with_an_entry_per_layer_follow_the_kept_layers(keep: int | list[int]) -> None:
    kinds = ["full_attention", "sliding_attention"] * 3
    parent = Qwen2Config(num_hidden_layers=6, layer_types=kinds, use_sliding_window=True, max_window_layers=3)
    config, kept = kept_config(parent, keep)
    assert config.num_hidden_layers == len(config.layer_types) == (keep if isinstance(keep, int) else len(keep))
    assert isinstance(keep, int) or kept == keep
    assert config.layer_types == [kinds[index] for index in kept]
    assert config.max_window_layers == sum(index < 3 for index in kept)


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"student\.keep\.layers=\[0, 6\]: layer 6 does not exist in a teacher of 6 layers, .* the last is 5"
    ):
        kept_config(LlamaConfig(num_hidden_layers=6), [0, 6])
