"""Which shape of a budget loses least: first by the scores that go, then by the KL from the model as it is, on a few windows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..axis_map import WIDTHS
from ..shape_search import Shape
from ..sizes import ChannelScore, DepthScore, Sizes, sizes_of
from .choose import best, best_heads
from .kept import Kept
from .parent_outputs import ParentOutputs
from .score_cache import ScoreCache
from .score_store import ScoreStore
from .shape_choice import selected
from .structured import cut


@dataclass(frozen=True)
class Ranked:
    """A shape whose KL was measured."""

    shape: Shape
    kept: Kept
    kl: float
    """KL divergence from the model as it is, as cut, in nats per token."""


class ShapeRanking:
    """Ranks shapes of one model, by scores that are computed once."""

    def __init__(
        self,
        cache: ScoreCache,
        windows: Sequence[Mapping[str, Tensor]],
        store: ScoreStore,
        *,
        score: ChannelScore,
        depth_score: DepthScore,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            cache: The scores of the model.
            windows: Batches of the text on which the KL is measured.
            store: Keeps each KL as soon as it is measured: a killed search goes on where it was.
            score: How channels and heads are ranked.
            depth_score: How layers are.
            tell: Gets a line now and then.
        """
        self._cache, self._store, self._tell = cache, store, tell
        self._score: ChannelScore = score
        self._depth_score: DepthScore = depth_score
        self._windows = windows
        self.before = sizes_of(cache.model.config, cache.family)
        self._judge: ParentOutputs | None = None
        self._lost: dict[tuple[str, ...], float] = {}

    def kept(self, shape: Shape) -> Kept:
        """The indices that a cut to a shape keeps."""
        return selected(self._cache, shape.kept(self.before), score=self._score, depth_score=self._depth_score)

    def losses(self, shape: Shape) -> tuple[float, float, float, float]:
        """Shares of the squared scores that go with FFN channels, heads and hidden channels, and of the influence of layers."""
        sizes = shape.sizes
        return (
            self._share("ffn", sizes.ffn),
            self._share("heads", sizes.heads, sizes.kv_heads),
            self._share("hidden", sizes.hidden),
            self._share("layers", sizes.layers),
        )

    def best(self, shapes: Sequence[Shape], measured: int) -> list[Ranked]:
        """The shapes with the least KL, the best first.

        Half of those that are measured are the best of each kind of cut (which axes get smaller) by the share of scores that goes. A fit of
        their KL to these shares then picks the other half.

        Args:
            shapes: Shapes within a budget.
            measured: How many of them are measured.

        Raises:
            UserError: the windows have no two tokens in a row.
            NonFiniteError: a score or a KL is not finite.
        """
        lost = {shape: self.losses(shape) for shape in shapes}
        order = sorted(shapes, key=lambda shape: sum(lost[shape]))
        chosen = first_of_kinds(order, max(1, -(-measured // 2)), self.before)
        found = [self.measured(shape) for shape in chosen]
        left = [shape for shape in order if shape not in set(chosen)]
        if left and len(found) < measured:
            slopes = fitted(torch.tensor([lost[one.shape] for one in found]), torch.tensor([one.kl for one in found]))
            left.sort(key=lambda shape: float(torch.tensor(lost[shape]) @ slopes))
            found += [self.measured(shape) for shape in left[: measured - len(found)]]
        # of equal ones the larger model, which is the first
        return sorted(found, key=lambda one: one.kl)

    def measured(self, shape: Shape) -> Ranked:
        """A shape with its KL, from the store if it was measured before."""
        kept, name = self.kept(shape), shape.words(self.before)
        known = self._store.numbers(self._part)
        if name not in known:
            if self._judge is None:
                self._judge = ParentOutputs(self._cache.model, self._windows)
            kl = self._judge.kl(cut(self._cache.model, kept))
            self._store.put_numbers(self._part, {**known, name: {"parameters": shape.parameters, "kl": kl}})
            self._tell(f"  KL {kl:.4f} as cut: {name}")
            return Ranked(shape, kept, kl)
        return Ranked(shape, kept, known[name]["kl"])

    def known(self) -> dict[str, dict[str, float]]:
        """Shape -> ``parameters`` and ``kl`` of all shapes that were ever measured on this text, whatever their budget."""
        return self._store.numbers(self._part)

    @property
    def _part(self) -> str:
        rows = sum(len(batch["input_ids"]) for batch in self._windows)
        return f"kl-{self._score}-{self._depth_score}-{rows}"

    def _share(self, axis: str, *numbers: int) -> float:
        name = (axis, *map(str, numbers))
        if name not in self._lost:
            self._lost[name] = self._computed(axis, numbers)
        return self._lost[name]

    def _computed(self, axis: str, numbers: tuple[int, ...]) -> float:
        before = self.before
        full = (before.heads, before.kv_heads) if axis == "heads" else (getattr(before, axis),)
        if numbers == full:
            return 0.0
        if axis == "layers":
            kept = self._cache.layers(numbers[0], self._depth_score)
            influence = self._cache.influence().double().clamp(min=0)
            return 1 - float(influence[kept].sum() / influence.sum().clamp(min=1e-30))
        scores = self._cache.channels(self._score)
        if axis == "hidden":
            parts = [(scores.hidden_of(range(before.layers)), None)]
        elif axis == "heads":
            parts = list(zip(scores.axes["heads"], scores.axes["kv_heads"], strict=True))
        else:
            parts = [(part, None) for part in scores.axes["ffn"]]
        gone = []
        for part, keys in parts:
            if keys is None:
                indices = best(part, numbers[0])
            else:
                after = Sizes(**{**before.record(), "heads": numbers[0], "kv_heads": numbers[1]})
                indices, _ = best_heads(part, keys, before, after)
            squares = part.double().square()
            gone.append(1 - float(squares[indices].sum() / squares.sum().clamp(min=1e-30)))
        return sum(gone) / len(gone)


def first_of_kinds(order: Sequence[Shape], number: int, before: Sizes) -> list[Shape]:
    """``number`` shapes in the given order: first the best of each kind of cut, then the best that are left.

    A sum of shares compares axes by guess; so every kind of cut is measured once before any is measured twice.
    """
    kinds: dict[tuple[str, ...], Shape] = {}
    for shape in order:
        kinds.setdefault(tuple(axis for axis in (*WIDTHS, "layers") if axis in shape.kept(before)), shape)
    chosen = list(kinds.values())[:number]
    return chosen + [shape for shape in order if shape not in set(chosen)][: number - len(chosen)]


def fitted(shares: Tensor, kl: Tensor) -> Tensor:
    """Slopes >= 0 of a sum that is near the measured KL: least squares, without the axes whose slope would be negative.

    Args:
        shares: [measured, axes].
        kl: [measured].
    """
    shares, kl = shares.double(), kl.double()
    used = [axis for axis in range(shares.shape[1]) if float(shares[:, axis].max()) > 0]
    slopes = torch.zeros(shares.shape[1], dtype=torch.float64)
    while used:
        # a ridge, because few measurements may leave axes undetermined
        matrix = shares[:, used]
        gram = matrix.T @ matrix
        found = torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(used), dtype=gram.dtype), matrix.T @ kl)
        if bool((found >= 0).all()):
            slopes[used] = found
            break
        used.pop(int(found.argmin()))
    return slopes.float()
