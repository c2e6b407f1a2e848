"""Documents to one stream of token ids on disk, in bounded memory; cut short, it goes on where it was."""

import hashlib
import itertools
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from .encoding import facts_of, spelling, text_only
from .unfinished import Unfinished
from .windows import DTYPE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PIECE_CHARACTERS = 1_000_000
"""Longer documents are encoded in pieces, cut behind a line end: a tokenizer's memory grows with what it is given at once."""
_BATCH_CHARACTERS = 2_000_000
_BATCH_PIECES = 1024
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class TokenStream:
    """All documents, one after the other."""

    tokens: np.ndarray
    """int32 [T], mapped from disk."""
    bounds: np.ndarray
    """int64 [D + 1]; document d is ``tokens[bounds[d]:bounds[d + 1]]``."""
    hashes: np.ndarray
    """uint64 [D], of each document's text: what the split goes by, the same on every machine."""


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of all that decides token ids; padding and truncation, which calls switch on and off, are left out."""
    import json

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        facts: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
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
    """Encode ``documents`` into ``work``: an end-of-text token behind each, a begin-of-text one where the tokenizer adds it.

    Args:
        work: Documents that it has already are passed over.
        say: Told every ten seconds how far it is.
        need_end: Whether documents must be told apart by an end-of-text token (packing).
        control: Whether control tokens that the text spells (``<|endoftext|>``) are read as such; else they are text. Documents that
            spell some are counted in ``work.notes``.

    Raises:
        UserError: ``need_end``, and the tokenizer has none.
    """
    if need_end and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text token (eos_token), which packing puts between documents; name one in its "
            "tokenizer_config.json, or set data.packing: false"
        )
    begin, end = _outer_ids(tokenizer)
    spelled = _Spelled(tokenizer, control)
    encoder = tokenizer if control else text_only(facts_of(tokenizer))
    bounds, hashes = work.bounds, work.hashes
    total, told = bounds[-1], time.monotonic()
    if hashes:
        say(f"tokenizing goes on behind document {len(hashes):,} ({total:,} tokens)")
    with _tokenizers_in_parallel():
        for batch in _batches(itertools.islice(documents, len(hashes), None)):
            ids = array("i")
            for (digest, first, last, text), part in zip(batch, _encode(encoder, [piece[3] for piece in batch])):
                if spelled.look(text, part, last):
                    work.notes[spelled.name] += 1
                ids.extend([*(begin if first else ()), *part, *(end if last else ())])
                if last:
                    bounds.append(total + len(ids))
                    hashes.append(digest)
            total += len(ids)
            work.write(ids)
            work.save()
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                say(f"tokenized {len(hashes):,} documents, {total:,} tokens")
    work.close()
    tokens = np.memmap(work.stream, dtype=DTYPE, mode="r") if total else np.empty(0, dtype=DTYPE)
    return TokenStream(tokens, np.array(bounds, dtype=np.int64), np.array(hashes, dtype=np.uint64))


def _outer_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Ids put before and behind each document. Begin-of-text only where the tokenizer itself starts a text with it (Llama does)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts: Any = tokenizer("a")["input_ids"]
    begin = [bos] if isinstance(bos, int) and len(starts) > 1 and starts[0] == bos else []
    return begin, [eos] if isinstance(eos, int) else []


def _encode(tokenizer: "PreTrainedTokenizerBase | Tokenizer", texts: list[str]) -> list[list[int]]:
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
        """One more piece; True behind a document that spells some."""
        self._seen = self._seen or not self._ids.isdisjoint(ids) or bool(self._pattern and self._pattern.search(text))
        found = self._seen and last
        self._seen = self._seen and not last
        return found


_Piece = tuple[int, bool, bool, str]


def _batches(documents: Iterable[str]) -> Iterator[list[_Piece]]:
    """(hash of the document, first piece, last piece, text) in batches of about two million characters."""
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
    line_end = text.rfind("\n", at, at + PIECE_CHARACTERS)
    return line_end + 1 if line_end >= 0 else at + PIECE_CHARACTERS


@contextmanager
def _tokenizers_in_parallel() -> Iterator[None]:
    """Threads while encoding; afterwards off, because data loader workers are forked (the library warns of that otherwise).

    A choice that the user has made in the environment is kept.
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
