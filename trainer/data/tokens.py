"""Encodes documents into one stream of token ids on disk, in bounded memory; an interrupted stream is continued."""

import hashlib
import itertools
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from .encoding import facts_of, spelling, text_only
from .token_arrays import TokenArray
from .unfinished import Unfinished
from .windows import DTYPE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PIECE_CHARACTERS = 1_000_000
"""Longer documents are encoded in pieces, cut after a line end: a tokenizer's memory grows with the length of one text."""
# enough for all threads of a fast tokenizer; a batch's text, ids and encodings are in memory together
_BATCH_CHARACTERS = 2_000_000
_BATCH_PIECES = 1024
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class TokenStream:
    """The concatenated tokens of all documents."""

    tokens: TokenArray
    """int32 [T], mapped from disk."""
    bounds: np.ndarray
    """int64 [D + 1]; document d is ``tokens[bounds[d]:bounds[d + 1]]``."""
    hashes: np.ndarray
    """uint64 [D], hash of each document's text, by which the split chooses; the same on every machine."""


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of everything that decides token ids."""
    import json

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        facts: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
        # calls of the tokenizer switch padding and truncation on and off
        facts = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    return sha256_json([facts, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])


def write_tokens(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    work: Unfinished,
    *,
    say: Callable[[str], None],
    need_end: bool,
    control: bool = True,
) -> TokenStream:
    """Encodes ``documents`` into ``work``, each with an end-of-text token, and a begin-of-text token if the tokenizer adds one.

    Args:
        documents: Texts in a fixed order.
        tokenizer: The tokenizer.
        work: The stream; documents that it already has are skipped.
        say: Called every ten seconds with a line about the progress.
        need_end: Whether documents must be separated by an end-of-text token (packing).
        control: Whether control tokens that the text spells (``<|endoftext|>``) are read as control tokens; if not, they are text.
            Documents that spell some are counted in ``work.notes``.

    Raises:
        UserError: ``need_end``, and the tokenizer has none.
    """
    encode_documents(documents, tokenizer, work, say=say, need_end=need_end, control=control)
    work.close()
    return TokenStream(mapped_tokens(work.stream), np.array(work.bounds, dtype=np.int64), np.array(work.hashes, dtype=np.uint64))


def mapped_tokens(path: Path) -> np.ndarray:
    """The token ids in a file, int32 [T], mapped from disk."""
    # an empty file cannot be mapped
    return np.memmap(path, dtype=DTYPE, mode="r") if path.stat().st_size else np.empty(0, dtype=DTYPE)


def encode_documents(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    work: Unfinished,
    *,
    say: Callable[[str], None],
    need_end: bool,
    control: bool,
) -> None:
    """``write_tokens`` without closing the stream; the arguments are the same."""
    if need_end and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text token (eos_token), which packing puts between documents; name one in its "
            "tokenizer_config.json, or set data.packing: false"
        )
    begin, end = outer_ids(tokenizer)
    spelled = _Spelled(tokenizer, control)
    encoder = tokenizer if control else text_only(facts_of(tokenizer))
    bounds, hashes = work.bounds, work.hashes
    total, reported = bounds[-1], time.monotonic()
    if hashes:
        say(f"tokenizing continues after document {len(hashes):,} ({total:,} tokens)")
    with _tokenizers_in_parallel():
        # documents come in a fixed order, so the first ones are those that an earlier process has encoded
        for batch in _batches(itertools.islice(documents, len(hashes), None)):
            ids = array("i")
            for (digest, first, last, text), part in zip(batch, _encode(encoder, [piece[3] for piece in batch])):
                if spelled.look(text, part, last):
                    work.notes[spelled.name] += 1
                # begin and end once per document, not once per piece
                ids.extend([*(begin if first else ()), *part, *(end if last else ())])
                if last:
                    bounds.append(total + len(ids))
                    hashes.append(digest)
            total += len(ids)
            work.write(ids)
            # counts complete documents alone: one that this batch cuts is encoded again from its beginning after a kill
            work.save()
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                say(f"tokenized {len(hashes):,} documents, {total:,} tokens")


def outer_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Ids before and after each document. Begin-of-text is added only if the tokenizer itself starts a text with it, as Llama's does."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # by trial: several tokenizers have a begin-of-text token that they never put before a text
    starts: Any = tokenizer("a")["input_ids"]
    begin = [bos] if isinstance(bos, int) and len(starts) > 1 and starts[0] == bos else []
    return begin, [eos] if isinstance(eos, int) else []


def _encode(tokenizer: "PreTrainedTokenizerBase | Tokenizer", texts: list[str]) -> list[list[int]]:
    # a plain tokenizers.Tokenizer from ``text_only``; _fast leaves out offsets, which are not needed here
    if not callable(tokenizer):
        return [encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    ids: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return ids["input_ids"]


class _Spelled:
    """Counts documents that spell control tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", control: bool) -> None:
        self.name = (
            f"documents that spell control tokens, which are read as {'control tokens' if control else 'text'} (data.special_tokens)"
        )
        self._ids = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} if control else set()
        self._pattern = None if control else spelling(tokenizer)
        self._seen = False

    def look(self, text: str, ids: list[int], last: bool) -> bool:
        """Looks at one more piece of a document; True at the last piece of a document that spells control tokens."""
        self._seen = self._seen or not self._ids.isdisjoint(ids) or bool(self._pattern and self._pattern.search(text))
        found = self._seen and last
        self._seen = self._seen and not last
        return found


_Piece = tuple[int, bool, bool, str]


def _batches(documents: Iterable[str]) -> Iterator[list[_Piece]]:
    """Yields batches of about two million characters: (hash of the document, whether it is its first and its last piece, text)."""
    batch: list[_Piece] = []
    size = 0
    for text in documents:
        digest = int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
        at = 0
        while at < len(text):
            cut = _piece_end(text, at)
            batch.append((digest, at == 0, cut == len(text), text[at:cut]))
            size += cut - at
            at = cut
            if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _piece_end(text: str, at: int) -> int:
    if len(text) - at <= PIECE_CHARACTERS:
        return len(text)
    # at a line end, where most tokenizers cut anyway, so the ids are nearly always those of the whole text
    line_end = text.rfind("\n", at, at + PIECE_CHARACTERS)
    return line_end + 1 if line_end >= 0 else at + PIECE_CHARACTERS


@contextmanager
def _tokenizers_in_parallel() -> Iterator[None]:
    """Switches the library's threads on while encoding, and off afterwards: it warns when data loader workers are forked with threads on.

    A value that the user has set in the environment is kept.
    """
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = "false"
