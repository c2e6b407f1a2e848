"""Indices of a chain of cuts, as indices of the first model: they give the same model in one cut, and damaged records end the chain."""

from typing import Any

import pytest
import torch

from decoct.models.axis_map import Axis
from decoct.models.family_map import family_of
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.kept_record import root_of, root_record
from decoct.models.pruning.shape_choice import select
from decoct.models.pruning.structured import cut
from decoct.models.sizes import sizes_of

from ...support.pruned_families import ids, tiny

FIRST: dict[Axis, int] = {"ffn": 16, "hidden": 18, "layers": 3}
CHAINS: list[tuple[dict[Axis, int], dict[Axis, int]]] = [
    (FIRST, {"ffn": 10, "heads": 2}),
    ({"heads": 4}, {"kv_heads": 1, "layers": 2}),
    ({"layers": 3}, {"hidden": 12, "ffn": 8}),
]


def chosen(model: Any, shape: dict[Axis, int]) -> Kept:
    return select(model, [{"input_ids": ids()}], shape)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3", "olmo2"])
@pytest.mark.parametrize(("first", "second"), CHAINS)
def test_two_cuts_are_one_cut_of_the_first_model(kind: str, first: dict[Axis, int], second: dict[Axis, int]) -> None:
    model = tiny(kind, dtype=torch.float32)
    family, before = family_of(model), sizes_of(model.config, family_of(model))
    kept_first = chosen(model, first)
    between = cut(model, kept_first)
    record = {"root": root_record({}, family, before, kept_first)}
    kept_second = chosen(between, second)
    record = {"root": root_record(record, family, sizes_of(between.config, family), kept_second)}
    twice = cut(between, kept_second)
    found = root_of(record, family, sizes_of(twice.config, family))
    assert found is not None
    assert found[0] == before
    once = cut(model, found[1]).state_dict()
    for name, weight in twice.state_dict().items():
        torch.testing.assert_close(weight, once[name])


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.update(shape={"ffn": 1}),
        lambda entry: entry["shape"].update(layers="4"),
        lambda entry: entry.update(kept=None),
        lambda entry: entry["kept"]["ffn"]["model.layers.1.mlp"].pop(),
        lambda entry: entry["kept"].update(layers=[0, 1, 7]),
        lambda entry: entry["kept"].update(hidden=["a"]),
        lambda entry: entry["kept"]["ffn"].popitem(),
        lambda entry: entry["kept"]["ffn"].update({"model.layers.0.mlp": list(range(9, 25))}),
    ],
)
def test_a_record_that_is_not_the_models_own_ends_the_chain(damage: Any) -> None:
    model = tiny("llama", dtype=torch.float32)
    family, before = family_of(model), sizes_of(model.config, family_of(model))
    kept = chosen(model, FIRST)
    entry = root_record({}, family, before, kept)
    after = kept.sizes(before)
    assert root_of({"root": entry}, family, after) == (before, kept)
    # the shape that another tool has made of it
    assert root_of({"root": entry}, family, before) is None
    damage(entry)
    assert root_of({"root": entry}, family, after) is None
    # the next cut then begins a chain of its own
    assert root_record({"root": entry}, family, after, Kept(layers=[0, 1]))["shape"] == after.record()


def test_a_folder_of_an_earlier_version_has_its_parent_for_a_root() -> None:
    model = tiny("llama", dtype=torch.float32)
    family, before = family_of(model), sizes_of(model.config, family_of(model))
    kept = chosen(model, FIRST)
    record = {"kept": kept.record(family, before.layers), "parent_shape": before.record()}
    assert root_of(record, family, kept.sizes(before)) == (before, kept)
    assert root_of({}, family, before) is None
