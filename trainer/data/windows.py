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
        rows = _mapped(path.with_suffix(".tokens"), DTYPE).reshape(-1, seq_length)
        lengths, starts = path.with_suffix(".lengths"), path.with_suffix(".starts")
        windows = cls(
            rows,
            np.fromfile(lengths, dtype=DTYPE) if lengths.exists() else None,
            _mapped(starts, STARTS_DTYPE) if starts.exists() else None,
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


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """A file as an array; an empty one cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


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


def write_labelled(
    path: Path, tokens: np.ndarray, documents: np.ndarray, seq_length: int, most: int | None = None, *, padding: int | None = None
) -> tuple[int, int]:
    """``write_packed`` for text of which only parts are learned: windows without a token to predict are left out.

    Args:
        tokens, documents, seq_length, most: As of ``write_packed``.
        padding: Token id that fills up a last window with what is left, if that is two tokens or more; None = leave it out.

    Returns: (windows written, also to ``<path>.lengths`` where the last one is padded; windows left out).
    """
    sizes = np.diff(documents)[:, 0]
    starts = np.unique(np.cumsum(sizes) - sizes)
    kept: list[np.ndarray] = []
    lengths: list[int] = []
    left_out = 0
    with path.with_suffix(".tokens").open("wb") as file:
        for index, row in enumerate(_windows_of(tokens, documents, seq_length)):
            if len(lengths) == most or (len(row) < seq_length and (padding is None or len(row) < 2)):
                break
            first, last = np.searchsorted(starts, [index * seq_length, index * seq_length + len(row)])
            own = starts[first:last] - index * seq_length
            learned = row >= 0
            learned[0] = False
            learned[own] = False
            if not learned.any():
                left_out += 1
                continue
            kept.append(own + len(lengths) * seq_length)
            lengths.append(len(row))
            _write(file, np.r_[row, np.full(seq_length - len(row), padding or 0, dtype=DTYPE)])
    np.concatenate([*kept, np.empty(0, dtype=np.int64)]).astype(STARTS_DTYPE).tofile(path.with_suffix(".starts"))
    if lengths and lengths[-1] < seq_length:
        np.array(lengths, dtype=DTYPE).tofile(path.with_suffix(".lengths"))
    return len(lengths), left_out


def _windows_of(tokens: np.ndarray, documents: np.ndarray, seq_length: int) -> Iterator[np.ndarray]:
    """The documents one after the other, int32 [seq_length] at a time; what is left in the end is shorter."""
    pending = np.empty(0, dtype=DTYPE)
    for begin, end in join_neighbours(documents).tolist():
        for at in range(begin, end, _COPY_TOKENS):
            pending = np.concatenate([pending, tokens[at : min(end, at + _COPY_TOKENS)]])
            whole = len(pending) // seq_length * seq_length
            yield from pending[:whole].reshape(-1, seq_length)
            pending = pending[whole:]
    if len(pending):
        yield pending


def write_padded(
    path: Path,
    tokens: np.ndarray,
    segments: np.ndarray,
    seq_length: int,
    padding: int,
    most_tokens: int | None = None,
    *,
    labelled: bool = False,
) -> tuple[int, int]:
    """Write each segment (a document) as windows of its own, the last one padded; windows of a single token are left out.

    Stops before a window that would exceed ``most_tokens`` real tokens.

    Args:
        labelled: Leave out windows without a token to predict.

    Returns: (windows written to ``<path>.tokens``, with ``<path>.lengths``; windows left out because nothing is predicted in them).
    """
    num = total = left_out = 0
    with path.with_suffix(".tokens").open("wb") as file, path.with_suffix(".lengths").open("wb") as lengths:
        for begin, end in _cut(segments, seq_length):
            if labelled and (tokens[begin + 1 : end] < 0).all():
                left_out += 1
                continue
            total += end - begin
            if most_tokens is not None and total > most_tokens:
                break
            row = np.full(seq_length, padding, dtype=DTYPE)
            row[: end - begin] = tokens[begin:end]
            _write(file, row)
            _write(lengths, np.array([end - begin], dtype=DTYPE))
            num += 1
    return num, left_out


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
