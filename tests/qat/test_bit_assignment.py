"""The widths of least loss within a budget: against every combination, and as an ordinary scheme."""

import itertools
import random

import pytest

from decoct.qat.auto_weights import WeightSettings
from decoct.qat.bit_assignment import BudgetError, assign, groups_of, problem_of, scheme_fields
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec
from decoct.qat.stored_bytes import packed_matrix_bytes

SHAPES = {
    f"model.layers.{layer}.{name}": size
    for layer in range(2)
    for name, size in {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }.items()
}


def auto(budget: float | str, **more: object) -> WeightSettings:
    return WeightSettings(bits="auto", budget=budget, group_size=32, **more)  # pyright: ignore[reportArgumentType] - fields by name


def best(costs: list[list[int]], losses: list[list[float]], budget: int) -> tuple[float, int]:
    """(loss, cost) of the best of all combinations."""
    sums = (
        (sum(row[at] for row, at in zip(losses, every)), sum(row[at] for row, at in zip(costs, every)))
        for every in itertools.product(*(range(len(row)) for row in costs))
    )
    return min(pair for pair in sums if pair[1] <= budget)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all_combinations(seed: int) -> None:
    drawn = random.Random(seed)
    sizes = [drawn.choice([1, 2, 3, 7]) for _ in range(drawn.randint(1, 6))]
    costs = [[size * width for width in (2, 3, 4, 8, 16)] for size in sizes]
    # whole numbers, so that sums are exact and ties happen; not monotone, as noise makes them
    losses = [[float(drawn.randint(0, 9)) for _ in row] for row in costs]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = drawn.randint(least, most + 3)
    chosen = assign(costs, losses, budget)
    found = sum(row[at] for row, at in zip(losses, chosen)), sum(row[at] for row, at in zip(costs, chosen))
    assert found == best(costs, losses, budget)


def test_costs_without_a_common_divisor_keep_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.qat.bit_assignment.STEPS", 50)
    costs = [[1009, 2003, 4001], [997, 1999, 3989], [1013, 2011, 4003]]
    losses = [[9.0, 3.0, 0.0], [8.0, 2.0, 0.0], [5.0, 1.0, 0.0]]
    for budget in (3019, 4500, 6100, 9000, 11_993):
        chosen = assign(costs, losses, budget)
        assert sum(row[at] for row, at in zip(costs, chosen)) <= budget
        loss = sum(row[at] for row, at in zip(losses, chosen))
        # costs that are rounded up by at most a fiftieth of the room each
        assert loss <= best(costs, losses, budget - 3 * (budget - 3019) // 50 - 3)[0] if budget > 3100 else loss == 22.0


def test_a_budget_below_the_smallest_is_refused() -> None:
    with pytest.raises(BudgetError, match="the smallest choices take 30 bytes, and the budget is 29"):
        assign([[10, 20], [20, 40]], [[1.0, 0.0]] * 2, 29)


def test_what_servers_join_moves_together() -> None:
    names = [*SHAPES, *(f"model.layers.2.mlp.experts.{number}.{part}" for number in range(2) for part in ("gate_proj", "down_proj"))]
    short = [tuple(name.removeprefix("model.layers.") for name in group) for group in groups_of(names)]
    assert short[:4] == [
        ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"),
        ("0.self_attn.o_proj",),
        ("0.mlp.gate_proj", "0.mlp.up_proj"),
        ("0.mlp.down_proj",),
    ]
    # one kernel runs all experts of a layer
    assert len(short) == 9 and len(short[-1]) == 4


def test_the_assignment_is_an_ordinary_scheme() -> None:
    settings = auto(5.0)
    scheme = QuantScheme(weights=settings.base, overrides={"*.0.mlp.down_proj": SpecChange(bits=6)}, skip=("*.1.mlp.down_proj",))
    problem = problem_of(settings, scheme, SHAPES, 1000)
    # the pinned module and the skipped one are no choices; the pinned one counts
    assert len(problem.free) == 6 and len(problem.choices) == 7
    assert problem.weights == sum(rows * columns for rows, columns in SHAPES.values()) - 64 * 128
    assert problem.room == problem.weights * 5 // 8
    losses = [[1.0 / (at + 1 + place) for place in range(5)] for at in range(6)]
    specs = problem.specs(problem.solve(losses))
    taken = sum(packed_matrix_bytes(SHAPES[name], spec) for name, spec in specs.items())
    assert 0.8 * problem.room < taken <= problem.room
    weights, overrides, left = scheme_fields(specs, SHAPES)
    again = QuantScheme(weights=weights, overrides=overrides, skip=("*.1.mlp.down_proj", *left)).of_linears(SHAPES)
    assert again == {name: spec for name, spec in specs.items() if spec is not None}
    assert again["model.layers.0.mlp.down_proj"] == QuantSpec(bits=6, group_size=32)
    for layer in range(2):
        assert len({specs[f"model.layers.{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1


def test_bytes_count_the_whole_model() -> None:
    weights = sum(rows * columns for rows, columns in SHAPES.values())
    bits = problem_of(auto(4.0), QuantScheme(weights=auto(4.0).base), SHAPES, 5000)
    size = f"{weights // 2 + 5000}B"
    assert problem_of(auto(size), QuantScheme(weights=auto(4.0).base), SHAPES, 5000).room == bits.room
    # 2 bits and a 16-bit scale for 32 weights
    assert bits.bits(bits.least) == 2.5 and bits.bits(bits.most) == 16


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (2.4, r"budget=2.4 \(2.4 bits per weight\) is below 2.5 bits per weight, which the model takes with 2 bits everywhere"),
        ("10kB", r"budget=10kB \(10,000 bytes\) is below 28,040 bytes, which the model takes with 2 bits everywhere"),
        ("1MB", r"budget=1MB \(1,000,000 bytes\) holds the model with its linears unquantized, so there is nothing to choose; lower it"),
    ],
)
def test_impossible_budgets_are_named(budget: float | str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        problem_of(auto(budget), QuantScheme(weights=auto(4.0).base), SHAPES, 5000)
