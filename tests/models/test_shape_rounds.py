"""Rounds go to the shape by limited steps, and each is a shape that transformers takes."""

from typing import Any

import pytest

from decoct.models.axis_map import AXES, Axis
from decoct.models.common.errors import UserError
from decoct.models.family_map import family_of
from decoct.models.shape_rounds import Round, rounds_to
from decoct.models.sizes import Sizes, sizes_of, target_sizes

from ..support.pruned_families import CONFIGS, LAYER_NORM, tiny


def found(model: Any, kept: dict[Axis, int], most: float) -> tuple[Sizes, list[Round]]:
    tensors = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    family = family_of(model)
    return sizes_of(model.config, family), rounds_to(model.config, family, tensors, kept, most)


def counted(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if family_of(model).place(name)[0] is not None)


def test_equal_shares_go_and_all_axes_together() -> None:
    config: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    model = tiny("llama", head_dim=32, **config)
    before, rounds = found(model, {"ffn": 512, "heads": 4, "layers": 6}, 0.3)
    # 27 % of the parameters are left: at least four rounds of 30 %, and one more where heads and layers are whole
    assert 4 <= len(rounds) <= 5
    assert all(0.1 < one.removed <= 0.3 for one in rounds)
    assert rounds[-1].sizes == target_sizes(model.config, family_of(model), {"ffn": 512, "heads": 4, "layers": 6})
    # the first one cuts every axis, and a matrix that was aligned stays so
    assert set(rounds[0].kept(before)) >= {"ffn", "layers"}
    assert all(one.sizes.ffn % 128 == 0 for one in rounds)
    smaller = tiny("llama", head_dim=32, **{**config, "num_hidden_layers": 6, "intermediate_size": 512, "num_attention_heads": 4})
    assert rounds[-1].share == pytest.approx(counted(smaller) / counted(model))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_round_of_every_family_can_be_cut_from_the_one_before(kind: str) -> None:
    model = tiny(kind)
    # hidden / heads is the head_dim of these
    shape: dict[Axis, int] = {"ffn": 6, "layers": 2, **({"heads": 2, "hidden": 8} if kind in LAYER_NORM else {"heads": 2, "hidden": 12})}
    before, rounds = found(model, shape, 0.3)
    assert len(rounds) > 3
    for one in rounds:
        # this refuses what transformers would
        assert target_sizes(model.config, family_of(model), one.kept(sizes_of(model.config, family_of(model)))) == one.sizes
        assert all(one.sizes.of(axis) <= before.of(axis) for axis in AXES)
        assert one.removed > 0
        before = one.sizes
    assert rounds[-1].kept(sizes_of(model.config, family_of(model))) == {**shape, **({"kv_heads": 2} if kind in LAYER_NORM else {})}


def test_a_step_that_cannot_be_smaller_is_taken_whole() -> None:
    model = tiny("llama", num_hidden_layers=3)
    _, rounds = found(model, {"layers": 2}, 0.1)
    assert [one.removed for one in rounds] == [pytest.approx(1 / 3)]
    with pytest.raises(UserError, match=r"structured\.layers=3 keeps all layers"):
        found(model, {"layers": 3}, 0.1)
