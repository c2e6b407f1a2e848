"""A teacher read from its cache: drop-in for the teacher itself, without its memory and its time."""

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ...losses.shift import MASKED
from ...losses.sparse import SparseTargets
from ...models.settings import CACHED_BYTES, MOST_TOKENS, MOST_TOP_K, CacheSettings
from .keys import sequence_keys
from .packed_rows import RowFormat
from .store import Store


@runtime_checkable
class SparseTeacher(Protocol):
    """A teacher of whom a few probabilities per token are known."""

    @property
    def v_eff(self) -> int:
        """Tokens of the real vocabulary."""
        ...

    def sparse_targets(self, batch: Mapping[str, Tensor]) -> SparseTargets:
        """Of the B * (S - 1) positions that predict a token, in the order of ``shift_for_next_token``; masked ones hold anything."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Give targets on this device from now on."""
        ...

    def describe(self) -> str:
        """One line for people."""
        ...


def row_format(settings: CacheSettings, v_eff: int, temperature: float) -> RowFormat:
    """Sizes of a cache's rows; a vocabulary smaller than ``settings.tokens`` is kept nearly whole."""

    def form(tokens: int) -> RowFormat:
        top = {"top_k": min(4, tokens), "sampled": 1, "hybrid": max(1, tokens // 4)}[settings.mode]
        return RowFormat(v_eff, top, tokens - top, settings.mode == "top_k", temperature)

    if settings.tokens is not None:
        return form(min(settings.tokens, v_eff))
    most = min(MOST_TOP_K if settings.mode == "top_k" else MOST_TOKENS, v_eff)
    fitting = (tokens for tokens in range(most, 2, -1) if form(tokens).bytes <= CACHED_BYTES[settings.mode])
    return form(next(fitting, min(2, v_eff)))


class CachedTeacher:
    """The cache of a teacher.

    Args:
        store: Holds all sequences that will be asked for.
        form: How its rows are laid out.
        name: What ``describe`` calls it.
    """

    def __init__(self, store: Store, form: RowFormat, name: str) -> None:
        self._store, self._form, self._name = store, form, name
        self._device = torch.device("cpu")

    @property
    def v_eff(self) -> int:
        """Tokens of the real vocabulary."""
        return self._form.v_eff

    def to(self, device: torch.device | str) -> Self:
        """Decode on this device from now on."""
        self._device = torch.device(device)
        return self

    def sparse_targets(self, batch: Mapping[str, Tensor]) -> SparseTargets:
        """Targets of a batch.

        Raises:
            UserError: a sequence is not in the cache.
        """
        data = self._store.read(sequence_keys(batch)).to(self._device, non_blocking=True)
        return spread(self._form.decode(data), batch["labels"].to(self._device))

    def describe(self) -> str:
        """Name, mode and bytes."""
        kept = "with the mass of the others" if self._form.tail else "unbiased"
        tokens = self._form.top + self._form.others
        return f"the cache of {self._name} ({tokens} tokens a position, {kept}, {self._form.bytes} bytes)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def spread(known: SparseTargets, labels: Tensor) -> SparseTargets:
    """Targets of the unmasked positions, laid out over all of them; ``labels`` [B, S] are not shifted."""
    wanted = (labels[:, 1:] != MASKED).flatten()
    if not len(known.ids):
        one = torch.zeros(len(wanted), dtype=torch.int64, device=labels.device)
        zero = one.to(torch.float32)
        tail = None if known.log_tail is None else zero - torch.inf
        inclusion = None if known.log_inclusion is None else zero[:, None]
        return SparseTargets(one[:, None], zero[:, None], zero, one, tail, known.temperature, zero, inclusion)
    return known[(wanted.cumsum(0) - 1).clamp(min=0)]
