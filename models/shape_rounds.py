"""The shapes on the way to a much smaller one: each round of pruning removes a limited share. It imports no torch, because plans ask it."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .axis_map import AXES, Axis, Family
from .shape_search import Budget, Grid, Shape, ShapeSpace
from .sizes import Sizes, target_sizes

_STEPS = 8
"""Numbers that are tried between what an axis has and what it is to have."""
_EVEN = 0.1
"""How much an axis that runs ahead of the others weighs against a distance from the size that a round should have."""


@dataclass(frozen=True)
class Round:
    """One round: what is kept at its end."""

    sizes: Sizes
    share: float
    """Parameters of the decoder layers, as a share of those before the first round."""
    removed: float
    """Share of the decoder layers' parameters that this round removes."""

    def kept(self, before: Sizes) -> dict[Axis, int]:
        """Axis -> what is kept of it, of the axes that this round cuts."""
        return Shape(self.sizes, self.share, 0).kept(before)

    def words(self, before: Sizes) -> str:
        """The shape as ``--shape`` takes it."""
        return Shape(self.sizes, self.share, 0).words(before)


def rounds_to(config: Any, family: Family, tensors: Mapping[str, tuple[int, ...]], kept: Mapping[Axis, int], most: float) -> list[Round]:
    """The rounds from a model to a shape, of about equal shares. All axes get smaller together, as far as there are such shapes.

    Args:
        config: The model's config.
        family: Its axis map.
        tensors: Name -> shape of all its tensors, tied ones once.
        kept: Axis -> what is kept of it in the end.
        most: Share of the decoder layers' parameters that a round removes at most. Where every shape removes more, the least is taken.

    Raises:
        UserError: no model of the family has the shape in the end.
    """
    space = ShapeSpace(config, family, tensors, Budget("share", 1.0), Grid())
    before, after = space.before, target_sizes(config, family, kept)
    end = space.cost(after)
    found: list[Round] = []
    now, cost = before, 1.0
    while now != after:
        left = max(1, math.ceil(math.log(end / cost) / math.log(1 - most) - 1e-9))
        now = _next(space, now, after, cost * (end / cost) ** (1 / left), (1 - most) * cost)
        left_over = space.cost(now)
        found.append(Round(now, left_over, 1 - left_over / cost))
        cost = left_over
    return found


def _next(space: ShapeSpace, now: Sizes, after: Sizes, aim: float, limit: float) -> Sizes:
    """The shape between two that costs about ``aim`` and at least ``limit``, if there is one."""
    between = [sizes for sizes in _between(space, now, after) if sizes != now]
    costs = {sizes: space.cost(sizes) for sizes in between}

    def worth(sizes: Sizes) -> tuple[bool, float]:
        # below the limit the largest comes first
        allowed = costs[sizes] >= limit * (1 - 1e-9)
        return not allowed, abs(costs[sizes] - aim) + _EVEN * _spread(now, sizes, after) if allowed else -costs[sizes]

    # the last shape is always one
    return next(sizes for sizes in sorted(between, key=worth) if sizes == after or space.takes(sizes))


def _between(space: ShapeSpace, now: Sizes, after: Sizes) -> list[Sizes]:
    heads = sorted(
        {
            (keys * group, keys)
            for keys in _numbers(now.kv_heads, after.kv_heads)
            for group in _numbers(now.group, after.group)
        }
    )  # fmt: skip
    inside = itertools.product(
        _numbers(now.ffn, after.ffn, 128), heads, _numbers(now.hidden, after.hidden, 128), _numbers(now.layers, after.layers)
    )
    head_dim = space.before.head_dim
    made = (
        Sizes(ffn=ffn, heads=query, kv_heads=keys, hidden=hidden, layers=layers, head_dim=head_dim)
        for ffn, (query, keys), hidden, layers in inside
    )
    return [sizes for sizes in made if space.family.own_head_dim or sizes.hidden == sizes.heads * head_dim]


def _numbers(now: int, after: int, align: int = 1) -> list[int]:
    """Numbers from one to the other, aligned as both are."""
    while now % align or after % align:
        align //= 2
    return sorted({after + align * round(step / _STEPS * (now - after) / align) for step in range(_STEPS + 1)})


def _spread(now: Sizes, sizes: Sizes, after: Sizes) -> float:
    done = [(now.of(axis) - sizes.of(axis)) / (now.of(axis) - after.of(axis)) for axis in AXES if now.of(axis) > after.of(axis)]
    return max(done) - min(done)
