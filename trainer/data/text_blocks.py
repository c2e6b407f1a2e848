"""Cuts documents into blocks of one window, each with a hash of its tokens, and joins the blocks that are not held out."""

import hashlib
from dataclasses import dataclass

import numpy as np

from .tokens import TokenStream
from .windows import DTYPE, join_neighbours


@dataclass(frozen=True)
class TextBlocks:
    """All tokens of a stream as blocks, in its order."""

    places: np.ndarray
    """int64 [B, 2], begin and end of each block in the stream."""
    documents: np.ndarray
    """int64 [B], the document of each block."""
    whole: np.ndarray
    """bool [B]: a block of full length, or a whole document that is shorter; False for the tail of a longer document."""
    hashes: np.ndarray
    """uint64 [B], hash of the block's tokens; 0 where ``whole`` is False."""


def blocks_of(stream: TokenStream, length: int) -> TextBlocks:
    """Cuts each document into blocks of ``length`` tokens, counted from its beginning.

    Blocks with the same tokens have the same hash, wherever they stand, so that a passage that is repeated stays on one side.
    """
    begins, ends = stream.bounds[:-1], stream.bounds[1:]
    counts = -(-(ends - begins) // length)
    documents = np.repeat(np.arange(len(begins)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = begins[documents] + number * length
    places = np.stack([first, np.minimum(first + length, ends[documents])], axis=1).astype(np.int64)
    whole = (places[:, 1] - places[:, 0] == length) | (number == 0)
    hashes = np.zeros(len(places), dtype=np.uint64)
    for index in np.flatnonzero(whole).tolist():
        begin, end = places[index]
        # the stored form of the tokens, whatever the machine's byte order
        words = np.ascontiguousarray(stream.tokens[begin:end], dtype=DTYPE).tobytes()
        hashes[index] = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
    return TextBlocks(places, documents, whole, hashes)


def joined(blocks: TextBlocks, kept: np.ndarray) -> np.ndarray:
    """Stretches of adjacent blocks that are kept, int64 [num, 2]; each lies in one document, so that its start is a start to a model.

    Args:
        blocks: All blocks.
        kept: bool [B], which ones to keep.
    """
    before = np.r_[False, kept[:-1]] & np.r_[False, blocks.documents[1:] == blocks.documents[:-1]]
    after = np.r_[kept[1:], False] & np.r_[blocks.documents[1:] == blocks.documents[:-1], False]
    return np.stack([blocks.places[kept & ~before, 0], blocks.places[kept & ~after, 1]], axis=1)


def spread_windows(document: np.ndarray, wanted: int, length: int) -> np.ndarray:
    """Windows with ``wanted`` tokens from all over a document, int64 [num, 2]; all of it if that is less than a window more.

    Args:
        document: Begin and end, int64 [2].
        wanted: Tokens to take, at least 1.
        length: Tokens of a window.
    """
    begin, end = map(int, document)
    if end - begin < wanted + length:
        return np.array([[begin, end]], dtype=np.int64)
    number, available = -(-wanted // length), (end - begin) // length
    firsts = begin + np.arange(number) * available // number * length
    return join_neighbours(np.stack([firsts, firsts + length], axis=1))
