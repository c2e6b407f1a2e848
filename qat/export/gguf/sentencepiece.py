"""SentencePiece BPE ("llama" in llama.cpp; Llama 2, Mistral, Gemma), converted from tokenizer.json.

SentencePiece merges the neighbours whose merged piece has the best score; tokenizer.json lists the pairs to merge, best first. The two
agree if the list contains every split of each piece in two, as lists made from a SentencePiece model do; then the score of a piece is minus
its rank in the list.

Source: llama.cpp ``llama-vocab.cpp`` (llm_tokenizer_spm); transformers ``convert_slow_tokenizer.py`` (generate_merges).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....models.common.errors import UserError
from .container import F32, Value

_SPACE = "▁"


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Return whether the tokenizer falls back to byte tokens (``<0x0A>``), which only SentencePiece tokenizers do."""
    return bool(content["model"].get("byte_fallback"))


def sentencepiece_metadata(
    folder: Path, content: dict[str, Any], tokens: Mapping[int, str], added: set[int], rows: int
) -> dict[str, Value]:
    """Return the entries for scores and the treatment of spaces.

    Args:
        folder: Model folder, for messages.
        content: Content of tokenizer.json.
        tokens: Text by id, added tokens included.
        added: Ids of added tokens, which are found in the text before any merge.
        rows: Rows of the embedding; each gets a score.

    Raises:
        UserError: bytes without a token, or merges or a treatment of spaces without a SentencePiece equivalent.
    """
    vocabulary = content["model"]["vocab"]
    if lost := [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]:
        raise UserError(f"{folder}: the tokenizer has byte_fallback but no token {lost[0]}; it is not a SentencePiece tokenizer")
    whole = {tokens[index] for index in added}
    ranks = _ranks(folder, content, whole)
    _check_complete(folder, content, whole, ranks)
    # a higher score is merged earlier, so the first merge of the list has -1
    best = {index: -float(ranks.get(token, 0)) for index, token in tokens.items()}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [F32(best.get(index, 0.0)) for index in range(rows)],
        "tokenizer.ggml.add_space_prefix": _space_prefix(folder, content),
    }


def _pairs(content: dict[str, Any]) -> list[tuple[str, str]]:
    # older files have a pair as one text with a space
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _ranks(folder: Path, content: dict[str, Any], added: set[str]) -> dict[str, int]:
    """Return piece -> rank among merged pieces, from 1; UserError if the pairs of a piece are not consecutive."""
    ranks: dict[str, int] = {}
    last = ""
    for left, right in _pairs(content):
        piece = left + right
        # one score per piece can replace the ranks of its pairs only if no other piece is ranked between them
        if piece in ranks and piece != last and piece not in added:
            raise UserError(f"{folder}: merges of {piece!r} are not adjacent in tokenizer.json, so one score per piece cannot replace them")
        ranks.setdefault(piece, len(ranks) + 1)
        last = piece
    return ranks


def _check_complete(folder: Path, content: dict[str, Any], added: set[str], ranks: Mapping[str, int]) -> None:
    vocabulary, known = content["model"]["vocab"], set(_pairs(content))
    for piece in vocabulary:
        # added tokens are found before any merge, and byte tokens are never merged
        if piece in added or (piece.startswith("<0x") and piece.endswith(">")):
            continue
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            # SentencePiece never merges halves that it cannot reach by merges itself
            usable = all(half in vocabulary and half not in added and (len(half) == 1 or half in ranks) for half in pair)
            if usable and pair not in known:
                raise UserError(
                    f"{folder}: SentencePiece would join {pair[0]!r} and {pair[1]!r}, tokenizer.json does not; llama.cpp has no equivalent "
                    "of this tokenizer (BPE with byte_fallback that was not made from a SentencePiece model)"
                )


def _space_prefix(folder: Path, content: dict[str, Any]) -> bool:
    """Return whether a space is put before a text; spaces themselves become '▁' in every SentencePiece tokenizer."""
    normalizer, splitter = content.get("normalizer"), content.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer] if normalizer else []
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE} in steps
    prepends = {"type": "Prepend", "prepend": _SPACE} in steps
    if splitter and splitter["type"] == "Metaspace" and not steps and splitter["replacement"] == _SPACE and not splitter.get("split", True):
        return splitter["prepend_scheme"] != "never"
    # Gemma's split at spaces has no effect: the normalizer has replaced them all
    idle = splitter is None or (splitter["type"] == "Split" and splitter["pattern"] == {"String": " "})
    if replaces and idle and len(steps) == 1 + prepends:
        return prepends
    raise UserError(f"{folder}: llama.cpp has no equivalent of how the tokenizer treats spaces (normalizer {normalizer}, {splitter})")
