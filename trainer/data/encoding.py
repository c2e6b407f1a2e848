"""Encodes text with learned parts into token ids; control tokens that a message merely spells are encoded as plain text.

A message may contain ``<|im_end|>``, because it is about tokenizers or tries to end a turn. To distinguish it from the template's own
control tokens, a mark is put into spelled control tokens before the template is rendered, and removed before encoding.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from .rendering import Sample

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# the last code point of a private-use plane; U+10FFFE and U+10FFFF are no characters, so no text has them
_LAST_MARK = 0x10FFFD
_UNSPELLED = chr(0x10FFFF)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The text of all added tokens that are marked special."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]


def spelling(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """A pattern that finds spelled control tokens in text; None if the tokenizer has no control tokens."""
    # the longest first: one control token may begin with another
    words = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


def facts_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The content of the tokenizer's file, without padding and truncation.

    Raises:
        UserError: the tokenizer is slow and has no such file.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("this needs a fast tokenizer (tokenizer.json), which gives the place of each token in a text; this one is slow")
    return {**json.loads(backend.to_str()), "padding": None, "truncation": None}


def text_only(facts: dict[str, Any], *, inner: bool = False) -> "Tokenizer":
    """A tokenizer that encodes spelled control tokens as text. It keeps their ids under names that no text contains.

    Args:
        facts: From ``facts_of``.
        inner: For text that does not begin a document, to which the tokenizer must not add a leading space.
    """
    from tokenizers import Tokenizer

    # a deep copy: the caller's facts stay those of the real tokenizer
    facts = json.loads(json.dumps(facts))
    model = facts["model"]
    names = {token["content"] for token in facts["added_tokens"] if token["special"]} - {model.get("unk_token")}
    # byte tokens keep their names: the model looks them up by name to encode unknown characters
    names = {name for name in names if not _BYTE.fullmatch(name)}
    renamed = {name: f"{_UNSPELLED}{number}{_UNSPELLED}" for number, name in enumerate(sorted(names))}
    for token in facts["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(name, name): number for name, number in model["vocab"].items()}
    else:  # Unigram has a list of pairs, all of which it matches in text, control tokens too
        model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
    # Metaspace with this scheme puts a space before the first word of a document; each later part would count as a first one
    if inner:
        _replace(facts, "prepend_scheme", "first", "never")
    return Tokenizer.from_str(json.dumps(facts))


class Encoder:
    """Encodes samples.

    Args:
        tokenizer: A fast tokenizer, because the places of tokens in the text are needed.

    Raises:
        UserError: the tokenizer is slow.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._facts = facts_of(tokenizer)
        # trimmed offsets leave out the space at the start of a token, which may lie outside a learned span
        self._trims = _replace(self._facts.get("post_processor"), "trim_offsets", True, False)
        self._copies: dict[tuple[bool, bool], Tokenizer] = {}
        self.pattern = spelling(tokenizer)

    def mark_for(self, strings: Iterable[str]) -> str:
        """A mark: a character that is in none of ``strings``; '' if none of them spells a control token."""
        given = list(strings)
        if self.pattern is None or not any(map(self.pattern.search, given)):
            return ""
        taken = set().union(*given)
        # from the end of Unicode, where private characters are: texts hardly use them
        return next(chr(code) for code in range(_LAST_MARK, 0, -1) if chr(code) not in taken)

    def marked(self, text: str, mark: str) -> str:
        """``text`` with the mark after the first character of each control token that it spells."""
        assert self.pattern is not None
        return self.pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)

    def encode(self, sample: Sample, mark: str = "") -> tuple[list[int], list[bool]]:
        """(ids of the sample's text, whether each token lies in one of the sample's spans).

        Args:
            sample: Text and learned spans.
            mark: The mark that ``marked`` has put into the text; it is removed.
        """
        text, spans = sample.text, sample.spans
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        if mark and mark in text:
            marks = [at for at, character in enumerate(text) if character == mark]
            # places without marks: each is lower by the number of marks before it
            spans = [(begin - bisect_left(marks, begin), end - bisect_left(marks, end)) for begin, end in spans]
            text = text.replace(mark, "")
            # a mark follows the first character of a spelled control token
            spelled = {at - 1 - before for before, at in enumerate(marks)}
            parts = self._parts(text, spelled)
        else:
            parts = [(0, len(text), False)]
        for begin, end, as_text in parts:
            # parts begin and end at control tokens, where tokenizers cut the text anyway, so the ids are those of the whole
            part_ids, offsets = self._encode(text[begin:end], as_text=as_text, inner=begin > 0)
            ids.extend(part_ids)
            places.extend((first + begin, last + begin) for first, last in offsets)
        # a token counts as learned only if all of it is in a span; empty tokens, which some tokenizers add, never are
        inside = [any(first <= begin and end <= last for first, last in spans) and end > begin for begin, end in places]
        return ids, inside

    def _parts(self, text: str, spelled: set[int]) -> list[tuple[int, int, bool]]:
        """Cuts the text at the template's control tokens into parts (begin, end, whether the part spells control tokens)."""
        assert self.pattern is not None
        # control tokens without a mark come from the template: they are encoded as control tokens
        real = [found.span() for found in self.pattern.finditer(text) if found.start() not in spelled]
        runs = list(zip([0, *(end for _, end in real)], [*(begin for begin, _ in real), len(text)]))
        own = [(begin, end) for begin, end in runs if any(begin <= at < end for at in spelled)]
        parts: list[tuple[int, int, bool]] = []
        at = 0
        for begin, end in own:
            parts += [(at, begin, False)] * (begin > at) + [(begin, end, True)]
            at = end
        return parts + [(at, len(text), False)] * (at < len(text))

    def _encode(self, text: str, *, as_text: bool, inner: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if not self._trims and not as_text:
            output: Any = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return output["input_ids"], output["offset_mapping"]
        encoded = self._copy(as_text, inner and as_text).encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def _copy(self, as_text: bool, inner: bool) -> "Tokenizer":
        """The tokenizer with untrimmed offsets, as ``text_only`` for text that spells control tokens; made once per case."""
        if (as_text, inner) not in self._copies:
            from tokenizers import Tokenizer

            copy = text_only(self._facts, inner=inner) if as_text else Tokenizer.from_str(json.dumps(self._facts))
            self._copies[as_text, inner] = copy
        return self._copies[as_text, inner]


def _replace(value: Any, key: str, old: Any, new: Any) -> bool:
    """Replaces ``old`` by ``new`` wherever it is the value of ``key`` in nested ``value``, in place; returns whether it was found."""
    found = False
    if isinstance(value, dict):
        if value.get(key) == old and key in value:
            value[key], found = new, True
        for each in value.values():
            found = _replace(each, key, old, new) or found
    elif isinstance(value, list):
        for each in value:
            found = _replace(each, key, old, new) or found
    return found
