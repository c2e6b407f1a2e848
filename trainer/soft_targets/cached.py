"""A teacher that is read from its cache: a drop-in for the teacher without its memory and compute time."""

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ...losses.shift import MASKED
from ...losses.sparse import SparseTargets
from ...models.families import HeadTransform
from ...models.settings import CacheSettings
from ...models.teachers.local import Hidden
from .hidden_rows import HiddenFormat, read_head
from .keys import sequence_keys
from .packed_rows import RowFormat
from .row_layout import row_layout
from .store import Store


@runtime_checkable
class SparseTeacher(Protocol):
    """A teacher that gives a few probabilities per token."""

    @property
    def v_eff(self) -> int:
        """Number of tokens in the real vocabulary."""
        ...

    def sparse_targets(self, batch: Mapping[str, Tensor]) -> SparseTargets:
        """Targets of the B * (S - 1) positions that predict a token, ordered as by ``shift_for_next_token``; masked ones are arbitrary."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Returns targets on this device from now on."""
        ...

    def describe(self) -> str:
        """One line of text for messages."""
        ...


def row_format(settings: CacheSettings, v_eff: int, temperature: float) -> RowFormat:
    """Format of a cache's rows, in the layout of ``row_layout``."""
    return RowFormat(**vars(row_layout(settings, v_eff, temperature)))


class CachedTeacher:
    """A teacher that is read from its cache.

    Args:
        store: Holds all sequences of the training.
        form: Layout of its rows.
        name: Name of the teacher in ``describe``.
    """

    def __init__(self, store: Store, form: RowFormat, name: str) -> None:
        self._store, self._form, self._name = store, form, name
        self._device = torch.device("cpu")

    @property
    def v_eff(self) -> int:
        """Tokens of the real vocabulary."""
        return self._form.v_eff

    def to(self, device: torch.device | str) -> Self:
        """Decodes on this device from now on."""
        self._device = torch.device(device)
        return self

    def sparse_targets(self, batch: Mapping[str, Tensor]) -> SparseTargets:
        """Targets of a batch.

        Raises:
            UserError: a sequence is not in the cache.
        """
        # bytes go to the device and are decoded there: far less to move than ids and log-weights
        data = self._store.read(sequence_keys(batch)).to(self._device, non_blocking=True)
        return spread(self._form.decode(data), batch["labels"].to(self._device))

    def describe(self) -> str:
        """Name, tokens and bytes per position, and whether rows are unbiased samples."""
        kept = "with the mass of the others" if self._form.tail else "unbiased"
        tokens = self._form.top + self._form.others
        return f"the cache of {self._name} ({tokens} tokens per position, {kept}, {self._form.bytes} bytes)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class CachedStates:
    """A teacher whose last hidden states are read from its cache; a loss takes it for one in memory.

    Args:
        store: Holds all sequences of the training, and the head.
        form: Layout of its rows.
        transform: Of the logits after the head.
        name: Name of the teacher in ``describe``.
    """

    def __init__(self, store: Store, form: HiddenFormat, transform: HeadTransform, name: str) -> None:
        self._store, self._form, self._transform, self._name = store, form, transform, name
        self._weight, self._bias = read_head(store.folder)

    @property
    def v_eff(self) -> int:
        """Tokens of the real vocabulary."""
        return self._form.v_eff

    def to(self, device: torch.device | str) -> Self:
        """Moves the head, and decodes on this device from now on."""
        self._weight = self._weight.to(device)
        self._bias = None if self._bias is None else self._bias.to(device)
        return self

    def hidden_and_head(self, batch: Mapping[str, Tensor]) -> Hidden:
        """Last hidden states of ``batch`` and the head; zeros at positions that predict no token.

        Raises:
            UserError: a sequence is not in the cache.
        """
        device, labels = self._weight.device, batch["labels"]
        # bytes go to the device and are decoded there
        states = self._form.decode(self._store.read(sequence_keys(batch)).to(device, non_blocking=True))
        hidden = states.new_zeros(*labels.shape, self._form.hidden)
        # rows are those of the positions before unmasked labels, as ``capture`` writes them
        hidden[:, :-1][(labels[:, 1:] != MASKED).to(device)] = states
        return hidden, self._weight, self._bias, self._transform

    def describe(self) -> str:
        """Name, and how states are stored."""
        return f"the cache of {self._name} (last hidden states in {self._form.states}, {self._form.bytes} bytes per position)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def knows_given_text_alone(teacher: Any) -> bool:
    """Whether a teacher has predictions for the text that it was asked about, and for no other: a cache, or a server."""
    return isinstance(teacher, SparseTeacher | CachedStates)


def spread(known: SparseTargets, labels: Tensor) -> SparseTargets:
    """Spreads targets of the unmasked positions over all positions; ``labels`` [B, S] are not shifted."""
    # [B * (S - 1)]: the positions of ``shift_for_next_token``; the cache has rows for the unmasked ones alone
    wanted = (labels[:, 1:] != MASKED).flatten()
    # there is no row to repeat: any valid targets do, as all positions are masked
    if not len(known.ids):
        one = torch.zeros(len(wanted), dtype=torch.int64, device=labels.device)
        zero = one.to(torch.float32)
        tail = None if known.log_tail is None else zero - torch.inf
        inclusion = None if known.log_inclusion is None else zero[:, None]
        return SparseTargets(one[:, None], zero[:, None], zero, one, tail, known.temperature, zero, inclusion)
    # a masked position repeats the row of the unmasked one before it, which is never read
    return known[(wanted.cumsum(0) - 1).clamp(min=0)]
