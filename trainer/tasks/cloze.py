"""Task `cloze`: the last word of a sentence of held-out text, from all that stands before it (after LAMBADA, Paperno et al. 2016).

A word counts when the model's likeliest token is the text's at every position of the word. Unlike LAMBADA the sentences are not chosen by
people: many words cannot be guessed, so the score is far below 100% for any model, and is there to be compared with the teacher's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...losses.shift import MASKED
from ...models.common.errors import UserError
from ..data.order import sample_order
from ..evaluation.spread import standard_error
from .language_model import LanguageModel
from .score import TaskScore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.windows import Windows

NAME = "cloze"
CONTEXT = 16
"""Tokens that stand before a word at least, in its document and window."""
LETTERS = 3
"""Letters of a word at least."""
_SPACES = ("Ġ", "▁", " ")
"""How tokenizers write the space before a word: byte-level, SentencePiece, plain."""
_ENDS = (".", "!", "?")


@dataclass(frozen=True)
class Word:
    """The last word of a sentence."""

    window: int
    first: int
    """Position of its first token."""
    length: int
    """Number of its tokens."""


def last_words(windows: "Windows", tokenizer: "PreTrainedTokenizerBase") -> list[Word]:
    """Last words of the sentences of the text, in its order, with at least ``CONTEXT`` tokens before them."""
    return [word for index in range(len(windows)) for word in _words_of(index, windows[index], tokenizer)]


def _words_of(index: int, window: Any, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Word]:
    ids = window["input_ids"].tolist()
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    before = window["position_ids"].tolist() if "position_ids" in window else list(range(len(ids)))
    learned = (window["labels"] != MASKED).tolist()
    for end in range(1, len(pieces)):
        # the mark alone, or with what follows it in the same token (a closing quotation mark)
        if not pieces[end].startswith(_ENDS):
            continue
        first = end - 1
        while first > 0 and pieces[first].isalpha() and not pieces[first].startswith(_SPACES):
            first -= 1
        word = "".join(pieces[first:end])
        bare = word[1:] if word.startswith(_SPACES) else ""
        if len(bare) >= LETTERS and bare.isalpha() and before[first] >= CONTEXT and all(learned[first:end]):
            yield Word(index, first, end - first)


def score_cloze(model: LanguageModel, windows: "Windows", *, limit: int | None = None, seed: int = 0) -> TaskScore:
    """Share of last words that the model predicts with every token.

    Args:
        model: The model.
        windows: Held-out text, in the model's tokens.
        limit: Score at most this many words, chosen by the seed from all over the text; None = all.
        seed: Seed of the choice.

    Raises:
        UserError: the text has no sentence that ends in a word.
    """
    words = last_words(windows, model.tokenizer)
    if not words:
        raise UserError(
            "task cloze: the held-out text has no sentence that ends in a word and a full stop after at least "
            f"{CONTEXT} tokens; give text in sentences, or leave the task out"
        )
    if limit is not None and limit < len(words):
        words = [words[index] for index in sorted(sample_order(len(words), seed, 0)[:limit].tolist())]
    places = [(word.window, word.first + at) for word in words for at in range(word.length)]
    hit = [token == int(windows[window]["input_ids"][at]) for token, (window, at) in zip(model.likeliest(windows, places), places)]
    ends = np.cumsum([word.length for word in words]).tolist()
    right = [all(hit[end - word.length : end]) for word, end in zip(words, ends)]
    return TaskScore(
        task=NAME,
        metric="exact last word",
        score=sum(right) / len(right),
        stderr=_error(words, right),
        items=len(right),
        shots=0,
        limit=limit,
        batch=model.batch,
        seed=seed,
        source="decoct",
    )


def _error(words: Sequence[Word], right: Sequence[bool]) -> float | None:
    """Standard error over windows: words of one window share their text."""
    windows = [word.window for word in words]
    return standard_error(np.bincount(windows, right).tolist(), np.bincount(windows).tolist())
