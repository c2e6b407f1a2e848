"""The aligned shapes of a model within a budget: sizes, bytes as served, all from shapes. It imports no torch, because plans ask it."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

from .axis_map import AXES, Axis, Family
from .common.errors import UserError
from .sizes import Sizes, sizes_of, target_sizes

FORMS = "a share of the decoder layers' parameters (0.6, 60%), parameters of the model (80M), or bytes as served (900MB, 1.5GiB)"
GROUP = 128
"""Weights that share a scale of 16 bits in the count of bytes."""
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_NEAR = (0.04, 0.08, 0.16, 0.32, 1.0)
"""How far below the budget shapes may lie: the first of these within which there are any."""


@dataclass(frozen=True)
class Budget:
    """The largest model that is wanted."""

    kind: Literal["share", "parameters", "bytes"]
    amount: float

    def words(self, cost: float | None = None) -> str:
        """The budget, or a cost in its unit, as text."""
        number = self.amount if cost is None else cost
        if self.kind == "share":
            return f"{number:.1%} of the decoder layers' parameters"
        return f"{number / 1e6:,.2f}M parameters" if self.kind == "parameters" else f"{number / 1e6:,.1f} MB"


def parse_budget(given: float | str) -> Budget:
    """The budget of a setting.

    Raises:
        ValueError: it has none of the forms.
    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z%]+)\s*", given)
        unit = match[2].lower() if match else ""
        if match is None or unit not in _UNITS:
            raise ValueError(f"budget={given!r} is no budget; give {FORMS}")
        amount = float(match[1].replace("_", "")) * _UNITS[unit]
        if not amount:
            raise ValueError(f"budget={given!r} leaves nothing; give {FORMS}")
        return Budget("bytes", amount)
    if not given > 0 or given != given:
        raise ValueError(f"budget={given} must be greater than 0; give {FORMS}")
    if given == 1:
        raise ValueError(f"budget={given} keeps all parameters, so that nothing is pruned; give less than 1, or {FORMS}")
    if 1 < given < 1000:
        raise ValueError(f"budget={given} is neither a share nor a number of parameters; give {FORMS}")
    return Budget("share" if given < 1 else "parameters", float(given))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which shapes are tried, and as what they are served."""

    align: int = 128
    """Widths are multiples of this; of small models of a smaller power of two, so that there are about eight steps."""
    least: float = 0.3
    """Share of each axis that stays at least."""
    bits: int = 16
    """Bits of the linear weights of the decoder layers, for a budget in bytes."""
    context: int = 0
    """Tokens of which keys and values are counted, for a budget in bytes."""


@dataclass(frozen=True)
class Shape:
    """A shape within the budget."""

    sizes: Sizes
    cost: float
    """In the unit of the budget."""
    parameters: int

    def kept(self, before: Sizes) -> dict[Axis, int]:
        """Axis -> what is kept of it, of the axes that get smaller."""
        return {axis: self.sizes.of(axis) for axis in AXES if self.sizes.of(axis) < before.of(axis)}

    def words(self, before: Sizes) -> str:
        """The shape as ``--shape`` takes it."""
        return ",".join(f"{axis.removesuffix('_heads')}={number}" for axis, number in self.kept(before).items())


class ShapeSpace:
    """All aligned shapes that a model can be cut to."""

    def __init__(self, config: Any, family: Family, tensors: Mapping[str, tuple[int, ...]], budget: Budget, grid: Grid) -> None:
        """Nothing is computed yet.

        Args:
            config: The model's config.
            family: Its axis map.
            tensors: Name -> shape of all its tensors, tied ones once.
            budget: What the shapes may cost.
            grid: Which ones are tried.
        """
        self.config, self.family, self.budget, self.grid = config, family, budget, grid
        self.before = sizes_of(config, family)
        self._inside: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
        self._outside: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
        for name, shape in tensors.items():
            layer, _ = family.place(name)
            if layer in (0, None):
                (self._outside if layer is None else self._inside).append((family.entry(name) or ("",) * len(shape), shape))

    def parameters(self, sizes: Sizes) -> int:
        """Parameters of a shape, tied tensors once."""
        return sizes.layers * self._count(self._inside, sizes) + self._count(self._outside, sizes)

    def cost(self, sizes: Sizes) -> float:
        """What a shape costs, in the unit of the budget."""
        layer = self._count(self._inside, sizes)
        if self.budget.kind == "share":
            return sizes.layers * layer / (self.before.layers * self._count(self._inside, self.before))
        if self.budget.kind == "parameters":
            return self.parameters(sizes)
        matrices = self._count([entry for entry in self._inside if len(entry[1]) > 1], sizes)
        # groups of weights share a scale of 16 bits; norms, embeddings and the head stay in 16 bits
        width = self.grid.bits / 8 + (2 / GROUP if self.grid.bits < 16 else 0)
        cache = 2 * 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * self.grid.context
        return sizes.layers * (matrices * width + (layer - matrices) * 2) + self._count(self._outside, sizes) * 2 + cache

    @staticmethod
    def _count(entries: list[tuple[tuple[str, ...], tuple[int, ...]]], sizes: Sizes) -> int:
        return sum(
            prod(sum(map(sizes.width, axes.split("+"))) if axes else length for axes, length in zip(entry, shape, strict=True))
            for entry, shape in entries
        )

    def _steps(self, number: int, unit_of: int = 1) -> list[int]:
        """What may be kept of a width of ``number`` parts of ``unit_of`` channels each, ascending."""
        align = self.grid.align
        while align > 8 and number * unit_of < 8 * align:
            align //= 2
        kept = [part for part in range(1, number) if part * unit_of % align == 0 and part >= self.grid.least * number]
        return [*kept, number]

    def _heads(self) -> Iterator[tuple[int, int]]:
        """(query heads, key/value heads)."""
        before = self.before
        if before.group == 1:
            yield from ((heads, heads) for heads in self._steps(before.heads, before.head_dim))
            return
        widths = set(self._steps(before.heads, before.head_dim))
        for keys in range(1, before.kv_heads + 1):
            if keys >= self.grid.least * before.kv_heads:
                yield from ((keys * group, keys) for group in range(1, before.group + 1) if keys * group in widths)

    @cached_property
    def shapes(self) -> list[Shape]:
        """The shapes within the budget and near it, the largest first.

        Raises:
            UserError: the budget is below the smallest aligned shape, or the whole model is within it.
        """
        before, budget = self.before, self.budget
        # the refusals of the config: layers of different shapes and the like
        target_sizes(self.config, self.family, {"ffn": 1})
        if self.cost(before) <= budget.amount:
            raise UserError(f"the budget of {budget.words()} holds the whole model ({budget.words(self.cost(before))}); give less")
        depths = range(max(min(2, before.layers), round(self.grid.least * before.layers)), before.layers + 1)
        found: list[Shape] = []
        smallest: tuple[float, Sizes] | None = None
        for ffn, (heads, keys), hidden in itertools.product(self._steps(before.ffn), self._heads(), self._steps(before.hidden)):
            if not self.family.own_head_dim and hidden != heads * before.head_dim:
                continue
            for layers in depths:
                sizes = Sizes(ffn=ffn, heads=heads, kv_heads=keys, hidden=hidden, layers=layers, head_dim=before.head_dim)
                cost = self.cost(sizes)
                if smallest is None or cost < smallest[0]:
                    smallest = cost, sizes
                if (1 - _NEAR[-1]) * budget.amount <= cost <= budget.amount:
                    found.append(Shape(sizes, cost, self.parameters(sizes)))
        for near in _NEAR:
            inside = [shape for shape in found if shape.cost >= (1 - near) * budget.amount and self.takes(shape.sizes)]
            if inside:
                return sorted(inside, key=lambda shape: -shape.cost)
        assert smallest is not None
        raise UserError(
            f"the budget of {budget.words()} is below the smallest aligned shape, {Shape(smallest[1], 0, 0).words(before)} with "
            f"{budget.words(smallest[0])}; raise it, or lower search.least ({self.grid.least:g}) or search.align ({self.grid.align})"
        )

    def takes(self, sizes: Sizes) -> bool:
        """Whether transformers takes a model of the family with these sizes."""
        try:
            target_sizes(self.config, self.family, {axis: sizes.of(axis) for axis in AXES if sizes.of(axis) < self.before.of(axis)})
        except UserError:
            return False
        return True

    def most_even(self) -> Shape:
        """The shape that cuts all axes most alike: what a plan counts with before anything is scored."""

        def unevenness(shape: Shape) -> float:
            shares = [shape.sizes.of(axis) / self.before.of(axis) for axis in ("ffn", "heads", "hidden", "layers")]
            return sum((share - sum(shares) / 4) ** 2 for share in shares)

        return min(self.shapes, key=unevenness)
