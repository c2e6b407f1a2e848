"""Scores of one model on one text, each computed once: any shape is then chosen from them without reading the text again."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from ..axis_map import WIDTHS, Axis
from ..family_map import family_of
from ..sizes import ChannelScore, DepthScore, sizes_of
from .depth import layers_by_influence, layers_by_loss
from .grams import groups, stored_elements, summed, whole, width_of
from .ranks import ALONE, Ranks
from .score_store import ScoreStore
from .scores import Scores, activation_scores, adding_up, scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_GRAMS = 16 * 2**30
"""Bytes of Gram matrices that the store takes; of larger models they are summed each time."""


class ScoreCache:
    """The scores of a model, in memory and in a store. Every process of ``ranks`` makes the same calls."""

    def __init__(
        self,
        model: "PreTrainedModel",
        batches: Sequence[Mapping[str, Tensor]],
        store: ScoreStore | None = None,
        *,
        ranks: Ranks = ALONE,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Nothing is computed before it is asked for.

        Args:
            model: A model of a family with an axis map, in fp32; not changed.
            batches: All of the text, as for ``scored``; of several ``ranks`` each reads its share of the batches.
            store: Where parts are kept; None = in memory alone.
            ranks: The processes that score together. The first one alone reads and writes the store.
            tell: Gets a line where losses or Gram matrices are measured.
        """
        self.model, self._all, self._ranks, self._tell = model, batches, ranks, tell
        self.store = ScoreStore() if store is None else store
        self.family = family_of(model)
        self._sizes = sizes_of(model.config, self.family)
        self._held: dict[str, Scores] = {}
        self._before = self.store.written
        self.seconds = 0.0
        """Time that computing and reading scores has taken; of Gram matrices, where they are computed."""

    @property
    def computed(self) -> bool:
        """Whether something was not in the store."""
        return self.store.written > self._before

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    @property
    def _batches(self) -> Sequence[Mapping[str, Tensor]]:
        return self._ranks.share(self._all)

    def prepare(self, score: ChannelScore | None, grams: Sequence[str] = ()) -> None:
        """Computes what is missing of these scores and Gram matrices, in one pass over the text if memory allows.

        Args:
            score: The score of channels and heads; the block influence of layers comes with those of activations. None = no score.
            grams: Linears, of which the Gram matrices are stored unless all together take more than ``MOST_GRAMS`` bytes.

        Raises:
            UserError: there is no token to score on, or the store cannot be written.
            NonFiniteError: a score is NaN or infinite; then nothing is stored.
        """
        with self._timed():
            left = self._missing(grams) if self._storable(grams) else []
            if score is not None and score not in self._held and not self._has(score):
                if score in ("activation", "weight_activation"):
                    # as many Gram matrices as memory takes share the pass
                    left = self._read_activations(left)
                else:
                    self._keep(score, scored(self.model, self._batches, WIDTHS, score=score, ranks=self._ranks))
            for group in groups(self.model, left):
                sums = summed(self.model, self._batches, group)
                self._keep_grams({name: self._ranks.sum(value) for name, value in sums.items()})

    def channels(self, score: ChannelScore) -> Scores:
        """Scores along every axis, with the block influence of the layers where the score is one of activations; raises as ``prepare``."""
        self.prepare(score)
        if score not in self._held:
            with self._timed():
                self._held[score] = self._unpacked(score, self.store.tensors(score) or {})
        return self._held[score]

    def influence(self) -> Tensor:
        """[layers]: the block influence."""
        found = self.channels("weight_activation").influence
        assert found is not None
        return found

    def layers(self, keep: int, how: DepthScore) -> list[int]:
        """The layers that a model of ``keep`` layers keeps."""
        if keep == self._sizes.layers:
            return list(range(keep))
        if how == "block_influence":
            return layers_by_influence(self.influence(), keep)
        with self._timed():
            return layers_by_loss(self.model, self._batches, keep, how, self._tell, store=self.store, ranks=self._ranks)

    def grams(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, Gram matrix of what the linear reads) of each of these linears; for the first process alone if they are stored."""
        self.prepare(None, names)
        for group in groups(self.model, names):
            fresh = {} if self._storable(names) else summed(self.model, self._all, group)
            for name in group:
                flat = fresh[name] if name in fresh else (self.store.tensors(_part(name)) or {})["gram"]
                yield name, whole(flat.to(self.model.device), width_of(self.model, name))

    def _storable(self, names: Sequence[str]) -> bool:
        return sum(8 * stored_elements(width_of(self.model, name)) for name in names) <= MOST_GRAMS

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self._has(_part(name))]

    def _read_activations(self, grams: list[str]) -> list[str]:
        """Makes the pass, and returns the linears whose Gram matrices did not fit into it."""
        first = next(groups(self.model, grams), [])
        found, sums = activation_scores(self.model, self._batches, grams=first, ranks=self._ranks)
        self._keep_grams(sums)
        for score, values in found.items():
            self._keep(score, values)
        return grams[len(first) :]

    def _keep_grams(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            if self._ranks.rank == 0:
                self.store.put(_part(name), {"gram": value})

    def _has(self, part: str) -> bool:
        return self._ranks.first_says(self._ranks.rank == 0 and self.store.has(part))

    def _keep(self, score: ChannelScore, found: Scores) -> None:
        self._held[score] = found
        tensors = {f"{axis}.{layer}": part for axis, parts in found.axes.items() for layer, part in enumerate(parts)}
        tensors |= {f"hidden.{place}": part for place, part in enumerate(found.hidden)}
        if found.influence is not None:
            tensors["influence"] = found.influence
        if self._ranks.rank == 0:
            self.store.put(score, tensors)

    def _unpacked(self, score: ChannelScore, tensors: Mapping[str, Tensor]) -> Scores:
        inside: list[Axis] = [axis for axis in WIDTHS if axis != "hidden"]
        return Scores(
            axes={axis: [tensors[f"{axis}.{layer}"] for layer in range(self._sizes.layers)] for axis in inside},
            # last those of what is outside the layers
            hidden=[tensors[f"hidden.{place}"] for place in range(self._sizes.layers + 1)],
            add_hidden=adding_up(score),
            influence=tensors.get("influence"),
        )


def _part(name: str) -> str:
    return f"gram-{name}"
