"""Arrays of token ids that are read by slices: one file, or the files of several processes as if they were one."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TokenArray(Protocol):
    """int32 [T], read by slices that lie in it, such as an array of numpy."""

    def __getitem__(self, places: slice, /) -> np.ndarray:
        """The ids at ``places``, [begin, end)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all ids."""
        ...


class JoinedTokens:
    """The arrays ``parts``, one behind the other, without a copy of them."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        # an empty part would begin where the next one does, and hide it from the search below
        self._parts = [part for part in parts if len(part)]
        self._begins = np.cumsum([0, *map(len, self._parts)])

    @property
    def nbytes(self) -> int:
        """Bytes of all ids."""
        return sum(part.nbytes for part in self._parts)

    def __getitem__(self, places: slice, /) -> np.ndarray:
        begin, end = int(places.start or 0), int(self._begins[-1] if places.stop is None else places.stop)
        end = min(end, int(self._begins[-1]))
        at = int(np.searchsorted(self._begins, begin, side="right")) - 1
        found: list[np.ndarray] = []
        while begin < end:
            first = int(self._begins[at])
            part = self._parts[at][begin - first : end - first]
            found.append(part)
            begin += len(part)
            at += 1
        # nearly every slice lies in one part, and is a view of it
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, dtype=np.int32)])
