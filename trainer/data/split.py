"""Chooses the held-out documents by their text alone, so that the choice is the same on every machine and in every order."""

from dataclasses import dataclass

import numpy as np

from ...models.common.errors import UserError
from .tokens import TokenStream

_WASTE = 10
"""Whole documents may hold out a tenth of the text more than requested; if they would hold out more, the text is split in a document."""


@dataclass(frozen=True)
class Split:
    """Token positions of both sides, int64 [num, 2]: begin and end of each document (or part of one)."""

    train: np.ndarray
    """In the text's order."""
    evaluation: np.ndarray
    """In the order of the documents' hashes."""
    whole: bool
    """Whether no document is on both sides."""


def split_documents(stream: TokenStream, *, seq_length: int, eval_tokens: int, packing: bool) -> Split:
    """Holds out the documents with the smallest hashes until they have ``eval_tokens`` tokens; the others are for training.

    Documents with the same text are held out together, and evaluated once. If whole documents would hold out far more than requested
    (one long file, or many copies of one text), the last ``eval_tokens`` tokens of the text are held out instead.

    Raises:
        UserError: one of the sides would be empty; the message names the key to lower.
    """
    total = int(stream.bounds[-1])
    # packed text needs one full window per side; without packing two tokens make a window
    least = seq_length if packing else 2
    _check_size(total, len(stream.hashes), least, seq_length, eval_tokens)
    documents = np.stack([stream.bounds[:-1], stream.bounds[1:]], axis=1)
    hashes, firsts = np.unique(stream.hashes, return_index=True)
    # np.unique sorts by hash, so the documents with the smallest hashes come first, each text once
    held = np.cumsum(np.diff(documents[firsts])[:, 0])
    count = int(np.searchsorted(held, eval_tokens)) + 1
    if count <= len(held) and held[count - 1] <= eval_tokens + total // _WASTE:
        # by hash and not by index: copies of a held-out text leave the training side with it
        train = documents[stream.hashes > hashes[count - 1]]
        if np.diff(train).sum() >= least:
            return Split(train, documents[firsts[:count]], whole=True)
    # one cut through the text: the document that it falls into has a part on each side
    cut = total - eval_tokens
    before, after = documents[documents[:, 0] < cut], documents[documents[:, 1] > cut]
    return Split(np.minimum(before, cut), np.maximum(after, cut), whole=False)


def held_out_only(stream: TokenStream, *, eval_tokens: int | None) -> Split:
    """Holds out everything; there is no training.

    Args:
        stream: The tokens.
        eval_tokens: Hold out documents with this many tokens: those with the smallest hashes, each text once. None = all, in their order.

    Raises:
        UserError: there are fewer than two tokens.
    """
    documents = np.stack([stream.bounds[:-1], stream.bounds[1:]], axis=1)
    if eval_tokens is not None:
        _, firsts = np.unique(stream.hashes, return_index=True)
        held = np.cumsum(np.diff(documents[firsts])[:, 0])
        documents = documents[firsts[: int(np.searchsorted(held, eval_tokens)) + 1]]
    if np.diff(documents).sum() < 2:
        raise UserError("the text has fewer than two tokens, and the first one is not predicted; give more text")
    return Split(documents[:0], documents, whole=True)


def _check_size(total: int, documents: int, least: int, seq_length: int, eval_tokens: int) -> None:
    text = f"the text has {total:,} tokens in {documents:,} document(s)"
    if total < least:
        raise UserError(f"{text}, fewer than one window of data.seq_length={seq_length:,}; give more text or lower data.seq_length")
    if total - eval_tokens >= least:
        return
    most = total - least
    remedy = f"lower data.eval_tokens to at most {most:,}" if most >= seq_length else "lower data.seq_length and data.eval_tokens"
    raise UserError(
        f"{text}: with data.eval_tokens={eval_tokens:,} held out, less than one window of data.seq_length={seq_length:,} is left to "
        f"train on; give more text or {remedy}"
    )
