"""Chooses the held-out text by its content alone, so that the choice is the same on every machine and for every number of ranks."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...models.common.errors import UserError
from .text_blocks import blocks_of, joined, spread_windows
from .tokens import TokenStream

_WASTE = 10
"""Whole documents may hold out a tenth of the text more than requested; if they would hold out more, the text is split in a document."""
HeldOutRule = Literal["blocks", "end"]
"""How text is held out that whole documents would waste; ``data.held_out``."""
BLOCKS = 1
"""Version of the rule that holds out blocks; raise it whenever it would hold out others."""
WORDS = {
    "documents": "",
    "blocks": ", held out in blocks from all over the text, inside documents",
    "end": ", held out from the end of the text, inside a document",
}
"""The rule of a split, as the description of the text ends with it."""


@dataclass(frozen=True)
class Split:
    """Token positions of both sides, int64 [num, 2]: begin and end of each document (or part of one)."""

    train: np.ndarray
    """In the text's order."""
    evaluation: np.ndarray
    """In the order of the hashes of documents or blocks."""
    rule: Literal["documents", "blocks", "end"]
    """What is held out: whole documents (no document is on both sides), blocks inside documents, or the end of the text."""


def split_documents(stream: TokenStream, *, seq_length: int, eval_tokens: int, packing: bool, held_out: HeldOutRule = "blocks") -> Split:
    """Holds out the documents with the smallest hashes until they have ``eval_tokens`` tokens; the others are for training.

    Documents with the same text are held out together, and evaluated once. If whole documents would hold out far more than requested
    (one long file, or many copies of one text), documents are cut into blocks of ``seq_length`` tokens, and the blocks with the smallest
    hashes are held out. Where blocks do not suffice, the last ``eval_tokens`` tokens of the text are held out.

    Args:
        stream: The tokens.
        seq_length: Tokens of a window, and of a block.
        eval_tokens: Tokens to hold out.
        packing: Whether windows hold several documents.
        held_out: blocks = as above; end = without blocks, and the last held-out document is measured from its beginning, as all runs did
            before there were blocks.

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
            evaluation = documents[firsts[:count]]
            if held_out == "blocks":
                wanted = eval_tokens - int(held[count - 2] if count > 1 else 0)
                evaluation = np.concatenate([evaluation[:-1], spread_windows(evaluation[-1], wanted, seq_length)])
            return Split(train, evaluation, "documents")
    if held_out == "blocks" and (split := _split_blocks(stream, seq_length, eval_tokens, least)):
        return split
    # one cut through the text: the document that it falls into has a part on each side
    cut = total - eval_tokens
    before, after = documents[documents[:, 0] < cut], documents[documents[:, 1] > cut]
    return Split(np.minimum(before, cut), np.maximum(after, cut), "end")


def _split_blocks(stream: TokenStream, seq_length: int, eval_tokens: int, least: int) -> Split | None:
    """Holds out blocks; None if too few differ, or if copies of those held out make up too much of the text."""
    blocks = blocks_of(stream, seq_length)
    sizes = np.diff(blocks.places)[:, 0]
    candidates = np.flatnonzero(blocks.whole)
    hashes, firsts = np.unique(blocks.hashes[candidates], return_index=True)
    firsts = candidates[firsts]
    held = np.cumsum(sizes[firsts])
    count = int(np.searchsorted(held, eval_tokens)) + 1
    if count > len(held):
        return None
    chosen = firsts[:count]
    # the tail of a document is in no block: nothing is measured in it
    kept = ~blocks.whole | (blocks.hashes > hashes[count - 1])
    total = int(stream.bounds[-1])
    if sizes[kept].sum() < least or sizes[~kept].sum() > held[count - 1] + total // _WASTE:
        return None
    # full blocks first: each is one window then, and shorter documents fill the last ones
    chosen = chosen[np.argsort(sizes[chosen] < seq_length, kind="stable")]
    return Split(joined(blocks, kept), blocks.places[chosen], "blocks")


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
    return Split(documents[:0], documents, "documents")


def held_out_of_a_run(stream: TokenStream, *, seq_length: int, eval_tokens: int, packing: bool) -> Split:
    """What a run that trains on the same text would hold out, by blocks where documents are too long; without a training side.

    A text that is too short to be split is held out whole.
    """
    if int(stream.bounds[-1]) - eval_tokens < (seq_length if packing else 2):
        return held_out_only(stream, eval_tokens=eval_tokens)
    split = split_documents(stream, seq_length=seq_length, eval_tokens=eval_tokens, packing=packing)
    return Split(split.train[:0], split.evaluation, split.rule)


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
