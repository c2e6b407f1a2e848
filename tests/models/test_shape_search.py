"""The shapes of a budget: they cost what a built model costs, are aligned, and are all that transformers takes."""

from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.models.family_map import family_of
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.structured import cut
from decoct.models.shape_search import Budget, Grid, Shape, ShapeSpace, parse_budget
from decoct.models.sizes import sizes_of

from ..support.pruned_families import CONFIGS, tiny


def space(model: Any, budget: Budget, **grid: Any) -> ShapeSpace:
    tensors = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return ShapeSpace(model.config, family_of(model), tensors, budget, Grid(**{"align": 1, **grid}))


def student(model: Any, shape: Shape) -> Any:
    """A model of the shape, whichever parts it has."""
    before = sizes_of(model.config, family_of(model))
    kept = shape.kept(before)
    layers = kept.get("layers", before.layers)
    # the first heads of the first groups
    group = shape.sizes.group
    keys = range(shape.sizes.kv_heads)
    heads = [key * before.group + index for key in keys for index in range(group)]
    return cut(
        model,
        Kept(
            layers=[*range(layers - 1), before.layers - 1],
            ffn=[list(range(kept["ffn"]))] * layers if "ffn" in kept else None,
            heads=[heads] * layers if "heads" in kept else None,
            kv_heads=[list(keys)] * layers if "kv_heads" in kept else None,
            hidden=list(range(kept["hidden"])) if "hidden" in kept else None,
        ),
    )


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_parameters_are_those_of_the_model_that_is_cut(kind: str) -> None:
    model = tiny(kind)
    found = space(model, Budget("share", 0.55))
    shapes = found.shapes
    total = sum(p.numel() for name, p in model.named_parameters() if found.family.place(name)[0] is not None)
    assert found.parameters(found.before) == sum(p.numel() for p in model.parameters())
    # three over the range, and each has a model
    for shape in (shapes[0], shapes[len(shapes) // 2], found.most_even()):
        made = student(model, shape)
        assert sum(p.numel() for p in made.parameters()) == shape.parameters
        inside = sum(p.numel() for name, p in made.named_parameters() if found.family.place(name)[0] is not None)
        assert inside / total == pytest.approx(shape.cost)
    assert all(0.55 * 0.96 <= shape.cost <= 0.55 for shape in shapes)
    assert len(set(shapes)) == len(shapes)


def test_bytes_count_bits_scales_keys_and_values() -> None:
    model = tiny("llama")
    found = space(model, Budget("bytes", 1.0), bits=4, context=100)
    before = found.before
    layers = [(name, p) for name, p in model.named_parameters() if ".layers." in name]
    matrices = sum(p.numel() for _, p in layers if p.ndim > 1)
    others = sum(p.numel() for p in model.parameters()) - matrices
    cache = 2 * 2 * before.layers * before.kv_heads * before.head_dim * 100
    assert found.cost(before) == pytest.approx(matrices * (0.5 + 2 / 128) + others * 2 + cache)
    plain = space(model, Budget("bytes", 1.0))
    assert plain.cost(before) == 2 * sum(p.numel() for p in model.parameters())


def test_widths_are_multiples_of_the_alignment() -> None:
    model = tiny("mistral", intermediate_size=1024, hidden_size=256)
    found = space(model, Budget("share", 0.5), align=64, least=0.25)
    assert all(shape.sizes.ffn % 64 == 0 for shape in found.shapes)
    # 256 channels are four steps of 64 and so are cut in steps of 32
    assert {shape.sizes.hidden for shape in found.shapes} <= set(range(64, 257, 32))
    assert all(shape.sizes.ffn >= 256 and shape.sizes.layers >= 1 for shape in found.shapes)


def test_budgets_that_nothing_can_meet_are_refused_with_the_smallest_shape() -> None:
    model = tiny("qwen2")
    with pytest.raises(
        UserError, match=r"budget of 1\.0% of .* is below the smallest aligned shape, ffn=\d+,heads=\d+.*lower search\.least"
    ):
        _ = space(model, Budget("share", 0.01)).shapes
    with pytest.raises(UserError, match=r"holds the whole model"):
        _ = space(model, Budget("parameters", 1e12)).shapes


@pytest.mark.parametrize(
    ("given", "kind", "amount"),
    [(0.6, "share", 0.6), (80e6, "parameters", 80e6), ("900MB", "bytes", 9e8), ("1.5 GiB", "bytes", 1.5 * 2**30), ("2gb", "bytes", 2e9)],
)
def test_the_forms_of_a_budget(given: Any, kind: str, amount: float) -> None:
    assert parse_budget(given) == Budget(kind, amount)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("given", [0, -1, 1, 60, "fast", "12 parsecs", "0MB", float("nan")])
def test_other_budgets_are_refused_with_the_forms(given: Any) -> None:
    with pytest.raises(ValueError, match=r"give .*a share of the decoder layers' parameters \(0\.6, 60%\)"):
        parse_budget(given)
