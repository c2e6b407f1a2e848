"""Windows of tokens in one file: rows of int32, read through a memory map."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""Label of positions that no loss looks at."""
DTYPE = np.dtype("<i4")
STARTS_DTYPE = np.dtype("<i8")
_COPY_TOKENS = 4_194_304


class Windows:
    """Training or evaluation windows.

    Args:
        rows: int32 [num, seq_length], token ids, ``-1 - id`` for those that are not predicted; anything behind a window's length.
        lengths: int32 [num], real tokens at the start of each row (at least 2); None = all rows are full.
        starts: int64, ascending: where documents begin in the windows laid end to end, which makes them packed ones; None = each
            window is (part of) one document.
    """

    def __init__(self, rows: np.ndarray, lengths: np.ndarray | None = None, starts: np.ndarray | None = None) -> None:
        self.rows, self.lengths, self.starts = rows, lengths, starts

    @classmethod
    def open(cls, path: Path, seq_length: int) -> "Windows":
        """Map ``<path>.tokens`` and, where they are, ``<path>.lengths`` and ``<path>.starts``."""
        rows = np.memmap(path.with_suffix(".tokens"), dtype=DTYPE, mode="r").reshape(-1, seq_length)
        lengths, starts = path.with_suffix(".lengths"), path.with_suffix(".starts")
        windows = cls(
            rows,
            np.fromfile(lengths, dtype=DTYPE) if lengths.exists() else None,
            np.memmap(starts, dtype=STARTS_DTYPE, mode="r") if starts.exists() else None,
        )
        windows._origin = (path, seq_length)
        return windows

    _origin: tuple[Path, int] | None = None

    def __reduce__(self) -> tuple[Callable[..., "Windows"], tuple[Any, ...]]:
        # a mapped file travels to data loader workers by its name, not by its content
        return (Windows.open, self._origin) if self._origin else (Windows, (self.rows, self.lengths, self.starts))

    @property
    def seq_length(self) -> int:
        """Tokens of a window, padding included."""
        return self.rows.shape[1]

    @property
    def tokens(self) -> int:
        """Real tokens of all windows."""
        return self.rows.size if self.lengths is None else int(self.lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window: ``input_ids``, ``labels``, ``attention_mask`` and, of packed ones, ``position_ids``; each int64 [seq_length].

        ``labels[i]`` is the token at i itself (losses do the causal shift); -100 for each document's first token, prompts and padding,
        so the labels that are left count the tokens to predict. Positions start at 0 with each document, and with the window: what
        ``models.batches`` keeps documents apart by.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        stored = torch.from_numpy(self.rows[index].astype(np.int64))
        ids = torch.where(stored < 0, -1 - stored, stored)
        length = self.seq_length if self.lengths is None else int(self.lengths[index])
        mask = torch.zeros_like(ids)
        mask[:length] = 1
        labels = ids.masked_fill((mask == 0) | (stored < 0), IGNORED)
        labels[0] = IGNORED
        window = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        if self.starts is not None:
            own = self._starts_in(index % len(self))
            labels[own] = IGNORED
            window["position_ids"] = _positions(own, self.seq_length)
        return window

    def _starts_in(self, index: int) -> np.ndarray:
        """Places in a window where documents begin, int64."""
        assert self.starts is not None
        begin = index * self.seq_length
        first, last = np.searchsorted(self.starts, [begin, begin + self.seq_length])
        return self.starts[first:last] - begin


def _positions(starts: np.ndarray, length: int) -> Tensor:
    """int64 [length]: distance from the last of ``starts``, or from 0."""
    origin = np.zeros(length, dtype=np.int64)
    origin[starts] = starts
    return torch.from_numpy(np.arange(length) - np.maximum.accumulate(origin))


def write_packed(path: Path, tokens: np.ndarray, documents: np.ndarray, seq_length: int, most: int | None = None) -> int:
    """Write the documents one after the other as full windows, at most ``most``; what fills no window is left out.

    Args:
        tokens: int32 [T].
        documents: int64 [num, 2], begin and end of each in ``tokens``.

    Returns: windows written to ``<path>.tokens``, with the beginnings of documents in ``<path>.starts``.
    """
    sizes = np.diff(documents)[:, 0]
    num = int(sizes.sum()) // seq_length
    num = num if most is None else min(num, most)
    left = num * seq_length
    starts = np.cumsum(sizes) - sizes
    np.unique(starts[starts < left]).astype(STARTS_DTYPE).tofile(path.with_suffix(".starts"))
    with path.with_suffix(".tokens").open("wb") as file:
        for begin, end in join_neighbours(documents).tolist():
            for at in range(begin, min(end, begin + left), _COPY_TOKENS):
                part = tokens[at : min(end, at + _COPY_TOKENS, at + left)]
                left -= _write(file, part)
    return num


def write_padded(
    path: Path, tokens: np.ndarray, segments: np.ndarray, seq_length: int, padding: int, most_tokens: int | None = None
) -> int:
    """Write each segment (a document) as windows of its own, the last one padded; windows of a single token are left out.

    Stops before a window that would exceed ``most_tokens`` real tokens.
    Returns: windows written to ``<path>.tokens``, with ``<path>.lengths``.
    """
    num = total = 0
    with path.with_suffix(".tokens").open("wb") as file, path.with_suffix(".lengths").open("wb") as lengths:
        for begin, end in _cut(segments, seq_length):
            total += end - begin
            if most_tokens is not None and total > most_tokens:
                break
            row = np.full(seq_length, padding, dtype=DTYPE)
            row[: end - begin] = tokens[begin:end]
            _write(file, row)
            _write(lengths, np.array([end - begin], dtype=DTYPE))
            num += 1
    return num


def join_neighbours(segments: np.ndarray) -> np.ndarray:
    """The same positions in the same order, int64 [num, 2], with segments that touch made one."""
    if len(segments) == 0:
        return segments
    starts = np.flatnonzero(np.r_[True, segments[1:, 0] != segments[:-1, 1]])
    ends = np.r_[starts[1:] - 1, len(segments) - 1]
    return np.stack([segments[starts, 0], segments[ends, 1]], axis=1)


def _cut(segments: np.ndarray, seq_length: int) -> Iterator[tuple[int, int]]:
    for begin, end in segments.tolist():
        for at in range(begin, end, seq_length):
            if min(end, at + seq_length) - at >= 2:
                yield at, min(end, at + seq_length)


def _write(file: BinaryIO, values: np.ndarray) -> int:
    file.write(np.ascontiguousarray(values, dtype=DTYPE).data)
    return len(values)
