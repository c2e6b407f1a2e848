"""Windows of tokens: rows of int32 in one file, read through a memory map."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from ...losses.shift import MASKED
from .token_arrays import TokenArray

DTYPE = np.dtype("<i4")
STARTS_DTYPE = np.dtype("<i8")
_COPY_TOKENS = 4_194_304  # 16 MiB of int32


class WindowSource(Protocol):
    """Windows of tokens that training and evaluation read, such as ``Windows``."""

    def __len__(self) -> int:
        """Number of windows."""
        ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        """input_ids, labels (-100 = none) and attention_mask of one window, each [S] int64."""
        ...


class Windows:
    """Training or evaluation windows.

    Args:
        rows: int32 [num, seq_length], token ids, ``-1 - id`` for tokens that are not predicted; padding may be any id.
        lengths: int32 [num], number of real tokens at the start of each row (at least 2); None = all rows are full.
        starts: int64, ascending, for packed windows: positions in the concatenated windows at which documents begin; None = each window
            is (part of) one document.
    """

    def __init__(self, rows: np.ndarray, lengths: np.ndarray | None = None, starts: np.ndarray | None = None) -> None:
        self.rows, self.lengths, self.starts = rows, lengths, starts

    @classmethod
    def open(cls, path: Path, seq_length: int) -> "Windows":
        """Maps ``<path>.tokens`` and, if they exist, ``<path>.lengths`` and ``<path>.starts``."""
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
        # data loader workers get the name of a mapped file, not its content
        return (Windows.open, self._origin) if self._origin else (Windows, (self.rows, self.lengths, self.starts))

    @property
    def seq_length(self) -> int:
        """Tokens per window, padding included."""
        return self.rows.shape[1]

    @property
    def tokens(self) -> int:
        """Real tokens of all windows."""
        return self.rows.size if self.lengths is None else int(self.lengths.sum(dtype=np.int64))

    @property
    def packed(self) -> bool:
        """Whether windows hold several documents."""
        return self.starts is not None

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window: ``input_ids``, ``labels``, ``attention_mask`` and, if packed, ``position_ids``; each int64 [seq_length].

        ``labels[i]`` is the token at i itself (losses do the causal shift), or -100 for each document's first token, prompts and padding,
        so the other labels count the tokens to predict. Positions start at 0 in each document and in the window; ``models.batches``
        separates documents by them.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        # a copy: the map is read-only, and embeddings and losses take int64
        stored = torch.from_numpy(self.rows[index].astype(np.int64))
        # -1 - id is its own inverse, and negative for every id
        ids = torch.where(stored < 0, -1 - stored, stored)
        length = self.seq_length if self.lengths is None else int(self.lengths[index])
        mask = torch.zeros_like(ids)
        mask[:length] = 1
        # not shifted: the losses shift once, for student and teacher alike
        labels = ids.masked_fill((mask == 0) | (stored < 0), MASKED)
        # nothing in the window predicts its first token
        labels[0] = MASKED
        window = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        if self.starts is not None:
            own = self._starts_in(index % len(self))
            labels[own] = MASKED
            # a document cut by the window's start counts from 0 too: it cannot see its beginning
            window["position_ids"] = _positions(own, self.seq_length)
        return window

    def _starts_in(self, index: int) -> np.ndarray:
        """Positions in a window at which documents begin, int64."""
        assert self.starts is not None
        begin = index * self.seq_length
        # ``starts`` counts over all windows, which are concatenated without gaps
        first, last = np.searchsorted(self.starts, [begin, begin + self.seq_length])
        return self.starts[first:last] - begin


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """Maps a file as an array. An empty file cannot be mapped and gives an empty array."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _positions(starts: np.ndarray, length: int) -> Tensor:
    """int64 [length]: distance from the last of ``starts``, or from 0."""
    # each position gets the largest start at or before it
    origin = np.zeros(length, dtype=np.int64)
    origin[starts] = starts
    return torch.from_numpy(np.arange(length) - np.maximum.accumulate(origin))


def write_packed(path: Path, tokens: TokenArray, documents: np.ndarray, seq_length: int, most: int | None = None) -> int:
    """Writes the concatenated documents as full windows, at most ``most``; tokens that fill no window are left out.

    Args:
        path: Path without suffix of the files to write.
        tokens: int32 [T], read by slices.
        documents: int64 [num, 2], begin and end of each document in ``tokens``.
        seq_length: Tokens per window.
        most: Largest number of windows; None = no limit.

    Returns:
        The number of windows written to ``<path>.tokens``; ``<path>.starts`` gets the beginnings of documents.
    """
    sizes = np.diff(documents)[:, 0]
    num = int(sizes.sum()) // seq_length
    num = num if most is None else min(num, most)
    # tokens to write; what fills no window is dropped at the end, not spread over windows
    left = num * seq_length
    starts = np.cumsum(sizes) - sizes
    # unique, because an empty document begins where the next one does
    np.unique(starts[starts < left]).astype(STARTS_DTYPE).tofile(path.with_suffix(".starts"))
    with path.with_suffix(".tokens").open("wb") as file:
        # whole runs of documents that are adjacent in the stream, in parts of bounded size: far fewer writes than one per document
        for begin, end in join_neighbours(documents).tolist():
            for at in range(begin, min(end, begin + left), _COPY_TOKENS):
                part = tokens[at : min(end, at + _COPY_TOKENS, at + left)]
                left -= _write(file, part)
    return num


def write_labelled(
    path: Path, tokens: TokenArray, documents: np.ndarray, seq_length: int, most: int | None = None, *, padding: int | None = None
) -> tuple[int, int]:
    """``write_packed`` for text of which only parts are learned: windows without a token to predict are left out.

    Args:
        path, tokens, documents, seq_length, most: As for ``write_packed``.
        padding: Token id that fills up the last window, if two or more tokens are left for it; None = leave these tokens out.

    Returns:
        (windows written, windows left out). ``<path>.lengths`` is written if the last window is padded.
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
            # the first token of a window or document has no predecessor, so nothing predicts it
            learned = row >= 0
            learned[0] = False
            learned[own] = False
            if not learned.any():
                left_out += 1
                continue
            # windows before this one may have been left out, so documents begin earlier in the file than in the stream
            kept.append(own + len(lengths) * seq_length)
            lengths.append(len(row))
            _write(file, np.r_[row, np.full(seq_length - len(row), padding or 0, dtype=DTYPE)])
    np.concatenate([*kept, np.empty(0, dtype=np.int64)]).astype(STARTS_DTYPE).tofile(path.with_suffix(".starts"))
    # only the last window can be short; without the file all windows count as full
    if lengths and lengths[-1] < seq_length:
        np.array(lengths, dtype=DTYPE).tofile(path.with_suffix(".lengths"))
    return len(lengths), left_out


def _windows_of(tokens: TokenArray, documents: np.ndarray, seq_length: int) -> Iterator[np.ndarray]:
    """Yields the concatenated documents as int32 [seq_length]; the last part may be shorter."""
    pending = np.empty(0, dtype=DTYPE)
    for begin, end in join_neighbours(documents).tolist():
        for at in range(begin, end, _COPY_TOKENS):
            # what is left of the last part, at most a window, and a part of bounded size: the stream is never in memory as a whole
            pending = np.concatenate([pending, tokens[at : min(end, at + _COPY_TOKENS)]])
            whole = len(pending) // seq_length * seq_length
            yield from pending[:whole].reshape(-1, seq_length)
            pending = pending[whole:]
    if len(pending):
        yield pending


def write_padded(
    path: Path,
    tokens: TokenArray,
    segments: np.ndarray,
    seq_length: int,
    padding: int,
    most_tokens: int | None = None,
    *,
    labelled: bool = False,
) -> tuple[int, int]:
    """Writes each segment (a document) as windows of its own, the last one padded; windows of a single token are left out.

    Args:
        path, tokens, seq_length: As for ``write_packed``.
        segments: int64 [num, 2], begin and end of each segment in ``tokens``.
        padding: Token id that fills up windows.
        most_tokens: Stops before a window that would exceed this number of real tokens; None = no limit.
        labelled: Leave out windows without a token to predict.

    Returns:
        (windows written to ``<path>.tokens``, with ``<path>.lengths``; windows left out because nothing is predicted in them).
    """
    num = total = left_out = 0
    with path.with_suffix(".tokens").open("wb") as file, path.with_suffix(".lengths").open("wb") as lengths:
        for begin, end in _cut(segments, seq_length):
            # without the first token, which nothing predicts
            if labelled and (tokens[begin + 1 : end] < 0).all():
                left_out += 1
                continue
            total += end - begin
            if most_tokens is not None and total > most_tokens:
                break
            # masked, so any id with a row in the embedding will do
            row = np.full(seq_length, padding, dtype=DTYPE)
            row[: end - begin] = tokens[begin:end]
            _write(file, row)
            _write(lengths, np.array([end - begin], dtype=DTYPE))
            num += 1
    return num, left_out


def join_neighbours(segments: np.ndarray) -> np.ndarray:
    """The same positions in the same order, int64 [num, 2], with adjacent segments joined."""
    if len(segments) == 0:
        return segments
    # a run begins where a segment does not start at the end of the one before it
    starts = np.flatnonzero(np.r_[True, segments[1:, 0] != segments[:-1, 1]])
    ends = np.r_[starts[1:] - 1, len(segments) - 1]
    return np.stack([segments[starts, 0], segments[ends, 1]], axis=1)


def _cut(segments: np.ndarray, seq_length: int) -> Iterator[tuple[int, int]]:
    for begin, end in segments.tolist():
        for at in range(begin, end, seq_length):
            # a window of one token predicts nothing
            if min(end, at + seq_length) - at >= 2:
                yield at, min(end, at + seq_length)


def _write(file: BinaryIO, values: np.ndarray) -> int:
    file.write(np.ascontiguousarray(values, dtype=DTYPE).data)
    return len(values)
