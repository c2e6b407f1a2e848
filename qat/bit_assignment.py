"""Chooses a width for every group of modules, with the least loss within a budget: a knapsack with one choice per group, solved exactly.

Groups are modules that servers join into one matrix or one kernel, so that they have one spec: q, k, v; gate, up; all experts of a layer.
The module imports no torch.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import reduce
from math import gcd

import numpy as np

from ..models.fused_linears import FUSED
from .auto_weights import WeightSettings
from .scheme import QuantScheme, SpecChange
from .spec import QuantSpec
from .stored_bytes import packed_matrix_bytes

STEPS = 200_000
"""Most steps into which the budget is divided. With more, costs are rounded up to whole steps, so that the budget still holds."""
DRAWS = 4
"""Random directions per window in which sensitivity is measured: the noise of ``second_order`` falls with their root."""
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
Shapes = Mapping[str, tuple[int, int]]
"""Full module name -> (rows, columns)."""


@dataclass(frozen=True)
class Choice:
    """A group of modules and what it may become."""

    modules: tuple[str, ...]
    """Full names."""
    specs: tuple[Mapping[str, QuantSpec | None], ...]
    """Per candidate the spec of each module; None = left alone. One candidate alone where ``overrides`` name the width."""
    costs: tuple[int, ...]
    """Bytes per candidate."""


@dataclass(frozen=True)
class Problem:
    """What is to be chosen, and the room for it."""

    choices: tuple[Choice, ...]
    weights: int
    """Weights of all choices."""
    rest: int
    """Bytes of everything else in the model as served."""
    room: int
    """Bytes that the choices may take together."""

    @property
    def free(self) -> list[Choice]:
        """The choices with more than one candidate."""
        return [choice for choice in self.choices if len(choice.costs) > 1]

    def solve(self, losses: Sequence[Sequence[float]]) -> list[int]:
        """The candidate of each of ``free`` with the least sum of ``losses`` [free][candidates] within the room."""
        fixed = sum(choice.costs[0] for choice in self.choices if len(choice.costs) == 1)
        return assign([choice.costs for choice in self.free], losses, self.room - fixed)

    def specs(self, chosen: Sequence[int]) -> dict[str, QuantSpec | None]:
        """The spec of every module for a candidate of each of ``free``; None = left alone."""
        found = {name: spec for choice, at in zip(self.free, chosen) for name, spec in choice.specs[at].items()}
        return found | {name: spec for choice in self.choices if len(choice.costs) == 1 for name, spec in choice.specs[0].items()}

    @property
    def least(self) -> int:
        """Bytes of the smallest choices."""
        return sum(min(choice.costs) for choice in self.choices)

    @property
    def most(self) -> int:
        """Bytes of the largest choices."""
        return sum(max(choice.costs) for choice in self.choices)

    def bits(self, size: int) -> float:
        """Bits per weight of choices that take ``size`` bytes."""
        return 8.0 * size / self.weights


class BudgetError(ValueError):
    """A budget that no assignment meets, or that does not ask for any rounding."""


def groups_of(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups of modules that get one width together, in the order of their first modules."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        expert = _EXPERT.fullmatch(name)
        fused = next((names for names in FUSED if last in names), (last,))
        found.setdefault((expert[1],) if expert else (parent, *fused), []).append(name)
    return [tuple(group) for group in found.values()]


def problem_of(auto: WeightSettings, scheme: QuantScheme, shapes: Shapes, rest: int) -> Problem:
    """The widths to choose for a model.

    Args:
        auto: Candidates and budget.
        scheme: The stage's scheme with ``auto.base`` as its weights.
        shapes: (rows, columns) of the decoder's linears by full name.
        rest: Bytes of everything but the linears that the scheme quantizes, as served.

    Raises:
        BudgetError: the budget is smaller than the smallest choice, or it holds the model unquantized.
        ValueError: as ``QuantScheme.of_linears``.
    """
    specs = scheme.of_linears(shapes)
    named = [pattern for pattern, change in scheme.overrides.items() if change.bits is not None or change.kind is not None]
    fixed = {name for name in specs if any(fnmatchcase(name, pattern) for pattern in named)}
    found = []
    # a module whose width is named is no part of a choice: the rest of its group chooses without it
    for group in groups_of(name for name in specs if name not in fixed):
        made = [{name: None if one is None else one.applied(specs[name]) for name in group} for one in auto.candidates]
        found.append(Choice(group, tuple(made), tuple(_bytes(one, shapes) for one in made)))
    found += [Choice((name,), ({name: specs[name]},), (_bytes({name: specs[name]}, shapes),)) for name in specs if name in fixed]
    weights = sum(shapes[name][0] * shapes[name][1] for name in specs)
    limit = auto.limit
    room = int(limit.bits * weights / 8) if limit.bits is not None else (limit.bytes or 0) - rest
    problem = Problem(tuple(found), weights, rest, room)
    _check(problem, auto, 2 * weights)
    return problem


def _bytes(specs: Mapping[str, QuantSpec | None], shapes: Shapes) -> int:
    return sum(packed_matrix_bytes(shapes[name], spec) for name, spec in specs.items())


def _check(problem: Problem, auto: WeightSettings, plain: int) -> None:
    asked, smallest = auto.limit.words(), auto.given_widths[0]
    if problem.room < problem.least:
        takes = (
            f"{problem.bits(problem.least):.4g} bits per weight" if auto.limit.bytes is None else f"{problem.rest + problem.least:,} bytes"
        )
        where = "everywhere" if len(problem.free) == len(problem.choices) else "where overrides name no width"
        raise BudgetError(
            f"budget={auto.budget} ({asked}) is below {takes}, which the model takes with {smallest} bits {where}, scales counted; "
            "raise it, or give larger groups or a smaller width"
        )
    if problem.room >= plain:
        raise BudgetError(
            f"budget={auto.budget} ({asked}) holds the model with its linears unquantized, so there is nothing to choose; lower it"
        )


def assign(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The candidate of each group with the least sum of losses whose costs are at most ``budget``; of equals the one that costs less.

    The optimum is exact where the costs have a common divisor that divides the budget into at most ``STEPS`` steps, as those of a decoder's
    matrices do; else it is the optimum of costs that are rounded up to a step.

    Raises:
        BudgetError: not even the cheapest candidates fit.
    """
    least = [min(own) for own in costs]
    room = budget - sum(least)
    if room < 0:
        raise BudgetError(f"the smallest choices take {sum(least):,} bytes, and the budget is {budget:,}")
    extra = [[cost - low for cost in own] for own, low in zip(costs, least)]
    # no assignment costs more than the dearest
    room = min(room, sum(max(own) for own in extra))
    unit = reduce(gcd, (cost for own in extra for cost in own), 0) or 1
    unit *= -(-(room // unit) // STEPS) or 1
    steps = room // unit
    # best[c]: the least loss of the groups so far at a cost of at most c steps
    best = np.zeros(steps + 1)
    taken = np.zeros((len(costs), steps + 1), dtype=np.int16)
    for index, (own, loss) in enumerate(zip(extra, losses)):
        after = np.full(steps + 1, np.inf)
        # cheaper candidates first: only a smaller loss replaces one
        for candidate in sorted(range(len(own)), key=lambda at: own[at]):
            width = -(-own[candidate] // unit)
            if width > steps:
                continue
            tried = np.full(steps + 1, np.inf)
            tried[width:] = best[: steps + 1 - width] + loss[candidate]
            better = tried < after
            after[better], taken[index][better] = tried[better], candidate
        best = after
    # the fewest steps that reach the least loss
    at = int(np.argmax(best <= best[-1]))
    chosen: list[int] = []
    for index in reversed(range(len(costs))):
        candidate = int(taken[index, at])
        chosen.append(candidate)
        at -= -(-extra[index][candidate] // unit)
    return chosen[::-1]


def scheme_fields(specs: Mapping[str, QuantSpec | None], shapes: Shapes) -> tuple[QuantSpec, dict[str, SpecChange], tuple[str, ...]]:
    """(weights, overrides, names to skip) of a scheme that gives every module its spec. ``weights`` is the spec of the most weights."""
    sizes: dict[QuantSpec, int] = {}
    for name, spec in specs.items():
        if spec is not None:
            sizes[spec] = sizes.get(spec, 0) + shapes[name][0] * shapes[name][1]
    common = max(sizes, key=lambda spec: (sizes[spec], spec.bits))
    overrides = {name: _change(spec, common) for name, spec in specs.items() if spec is not None and spec != common}
    return common, overrides, tuple(name for name, spec in specs.items() if spec is None)


def _change(spec: QuantSpec, common: QuantSpec) -> SpecChange:
    named = {entry.name for entry in fields(SpecChange)}
    return SpecChange(**{name: getattr(spec, name) for name in named if getattr(spec, name) != getattr(common, name)})
