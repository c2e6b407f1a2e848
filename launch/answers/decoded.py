"""Turns token ids into text as they come: no piece of a character is ever shown, and what was shown never changes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE = 8
"""Tokens of the prompt that are decoded with the answer: some tokenizers drop the space before the first token of a text."""


class Decoded:
    """The text of an answer that grows token by token.

    Args:
        tokenizer: Decodes, without special tokens.
        prompt: Ids that the answer continues.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = prompt[-_BEFORE:]
        # text up to _shown is out; decoding begins at _from, so that each step decodes a few tokens only
        self._from, self._shown = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that ``token`` completes; '' while a character is not whole."""
        self._ids.append(token)
        new = self._new()
        # U+FFFD at the end: bytes of a character are still missing
        if not new or new.endswith("\ufffd"):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return new

    def rest(self) -> str:
        """What is left at the end: pieces of a character that were never completed."""
        return self._new()

    def _new(self) -> str:
        # the difference of two decodings: a token decoded alone may lose its leading space
        return self._text(self._ids[self._from :])[len(self._text(self._ids[self._from : self._shown])) :]

    def _text(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)
