"""Text with learned parts to token ids: offsets as they are, and control tokens that a message spells as the text they are there.

A message may hold ``<|im_end|>``: somebody asks about tokenizers, or would like to end a turn. The template's own control tokens are
told from it by a mark that is put into the spelled ones before the template is rendered, and taken out again before encoding.
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

_LAST_MARK = 0x10FFFD
_UNSPELLED = chr(0x10FFFF)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The added tokens that are marked special, as they are spelled."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]


def spelling(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Finds spelled control tokens in text; None when there are none."""
    words = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


def facts_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What the tokenizer's file says, without padding and truncation.

    Raises: UserError for a slow tokenizer, which has no such file.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("this needs a fast tokenizer (tokenizer.json), which knows where in a text its tokens lie; this one is slow")
    return {**json.loads(backend.to_str()), "padding": None, "truncation": None}


def text_only(facts: dict[str, Any], *, inner: bool = False) -> "Tokenizer":
    """A tokenizer that takes spelled control tokens for text. Under their ids it has names that nobody spells.

    Args:
        facts: Of ``facts_of``.
        inner: For text that does not begin a document: only its very first word may get a space put before it.
    """
    from tokenizers import Tokenizer

    facts = json.loads(json.dumps(facts))
    model = facts["model"]
    names = {token["content"] for token in facts["added_tokens"] if token["special"]} - {model.get("unk_token")}
    names = {name for name in names if not _BYTE.fullmatch(name)}  # the model looks for these by name
    renamed = {name: f"{_UNSPELLED}{number}{_UNSPELLED}" for number, name in enumerate(sorted(names))}
    for token in facts["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(name, name): number for name, number in model["vocab"].items()}
    else:  # Unigram: pairs, found in text whatever they are
        model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
    if inner:
        _replace(facts, "prepend_scheme", "first", "never")
    return Tokenizer.from_str(json.dumps(facts))


class Encoder:
    """Encodes samples.

    Args:
        tokenizer: A fast one: places in the text are needed.

    Raises: UserError for a slow tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._facts = facts_of(tokenizer)
        self._trims = _replace(self._facts.get("post_processor"), "trim_offsets", True, False)
        self._copies: dict[tuple[bool, bool], Tokenizer] = {}
        self.pattern = spelling(tokenizer)

    def mark_for(self, strings: Iterable[str]) -> str:
        """A character for marks that is in none of ``strings``; '' when none of them spells a control token."""
        given = list(strings)
        if self.pattern is None or not any(map(self.pattern.search, given)):
            return ""
        taken = set().union(*given)
        return next(chr(code) for code in range(_LAST_MARK, 0, -1) if chr(code) not in taken)

    def marked(self, text: str, mark: str) -> str:
        """``text`` with the mark behind the first character of each control token that it spells."""
        assert self.pattern is not None
        return self.pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)

    def encode(self, sample: Sample, mark: str = "") -> tuple[list[int], list[bool]]:
        """(ids of the sample's text, whether each token's characters lie in one of its spans).

        Args:
            mark: What ``marked`` has put into the text, and is taken out.
        """
        text, spans = sample.text, sample.spans
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        if mark and mark in text:
            marks = [at for at, character in enumerate(text) if character == mark]
            spans = [(begin - bisect_left(marks, begin), end - bisect_left(marks, end)) for begin, end in spans]
            text = text.replace(mark, "")
            spelled = {at - 1 - before for before, at in enumerate(marks)}
            parts = self._parts(text, spelled)
        else:
            parts = [(0, len(text), False)]
        for begin, end, as_text in parts:
            part_ids, offsets = self._encode(text[begin:end], as_text=as_text, inner=begin > 0)
            ids.extend(part_ids)
            places.extend((first + begin, last + begin) for first, last in offsets)
        inside = [any(first <= begin and end <= last for first, last in spans) and end > begin for begin, end in places]
        return ids, inside

    def _parts(self, text: str, spelled: set[int]) -> list[tuple[int, int, bool]]:
        """The text cut at the template's control tokens: (begin, end, whether it spells control tokens and has none)."""
        assert self.pattern is not None
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
            told: Any = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return told["input_ids"], told["offset_mapping"]
        encoded = self._copy(as_text, inner and as_text).encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def _copy(self, as_text: bool, inner: bool) -> "Tokenizer":
        """The tokenizer with offsets that are not trimmed, for text that spells control tokens, or behind other text."""
        if (as_text, inner) not in self._copies:
            from tokenizers import Tokenizer

            copy = text_only(self._facts, inner=inner) if as_text else Tokenizer.from_str(json.dumps(self._facts))
            self._copies[as_text, inner] = copy
        return self._copies[as_text, inner]


def _replace(value: Any, key: str, old: Any, new: Any) -> bool:
    """Set ``key`` from ``old`` to ``new`` wherever it stands in ``value``, in place; whether it stood anywhere."""
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
