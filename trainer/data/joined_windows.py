"""Windows of several texts as one row of windows, text after text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blend import Blend
from .order import blend_of
from .windows import Windows, WindowSource

PART = "part"
"""Key of a batch of blended text, bool [B, texts]: the text of each row."""


class JoinedWindows(Windows):
    """Windows of a blend; ``blend.sizes[i]`` windows of each text, its first ones.

    Args:
        parts: Windows of each text, of the same length.
        blend: Their shares.
    """

    def __init__(self, parts: Sequence[Windows], blend: Blend) -> None:
        self.parts, self.blend = tuple(parts), blend

    def __reduce__(self) -> tuple[Callable[..., Windows], tuple[Any, ...]]:
        return JoinedWindows, (self.parts, self.blend)

    @property
    def seq_length(self) -> int:
        """Tokens per window, padding included."""
        return self.parts[0].seq_length

    @property
    def packed(self) -> bool:
        """Whether windows hold several documents."""
        return self.parts[0].packed

    @property
    def tokens(self) -> int:
        """Real tokens of all windows."""
        return sum(tokens_of(part, size) for part, size in zip(self.parts, self.blend.sizes))

    def __len__(self) -> int:
        return sum(self.blend.sizes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window, as ``Windows``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        text = self.blend.text_of(index)
        return self.parts[text][index - int(self.blend.begins[text])]


def tokens_of(windows: Windows, count: int) -> int:
    """Real tokens of the first ``count`` windows."""
    return count * windows.seq_length if windows.lengths is None else int(windows.lengths[:count].sum(dtype=np.int64))


def with_part(windows: WindowSource, index: int) -> dict[str, Tensor]:
    """A window, with ``PART`` if it belongs to a blend."""
    blend = blend_of(windows)
    if blend is None:
        return windows[index]
    return {**windows[index], PART: torch.arange(len(blend.sizes)) == blend.text_of(index)}
