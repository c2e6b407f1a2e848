"""Checks tokenizer files for ids and texts that would exhaust memory, before the tokenizers library reads them.

The library trusts its file. It allocates tables by the largest id, so an id of 10^9 kills the process silently; replacements in the
normalizer multiply text; some contradictions cause a Rust panic, which callers do not expect (``read_safely``).
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..common.errors import UserError
from ..common.json_file import read_json

MOST_ID = 2**24
"""Ids from this value on are refused; the largest vocabularies have a few hundred thousand tokens."""
_MOST_ADDED = 1024  # characters before each text
_MOST_GROWTH = 64  # times the length of the text
_REMEDY = "the file is damaged or not of a tokenizer; fetch or copy it again"
_Result = TypeVar("_Result")


def check_tokenizer_files(folder: Path) -> None:
    """Check ids, special tokens and the normalizer of a tokenizer. The library itself refuses other faults.

    Raises:
        UserError: the message names the file and the fault.
    """
    for name, ids in (
        ("tokenizer.json", _ids_of_tokenizer),
        ("tokenizer_config.json", lambda content: _keys(content.get("added_tokens_decoder"))),
        ("added_tokens.json", _values),
        ("vocab.json", _values),
    ):
        file = folder / name
        if file.is_file():
            content = read_json(file)
            # True is an int as well, and harmless as 1
            worst = max((i for i in ids(content) if isinstance(i, int)), default=0)
            if worst >= MOST_ID:
                raise UserError(f"{file}: the token id {worst!r:.40} is not below {MOST_ID:,}; {_REMEDY}")
            # other files have no normalizer
            if name == "tokenizer.json":
                _check_parts(file, content)


def read_safely(what: str, read: Callable[[], _Result]) -> _Result:
    """Call the tokenizers library; a panic becomes a ``UserError`` whose message begins with ``what``."""
    try:
        return read()
    # a Rust panic does not derive from Exception
    except BaseException as error:
        if is_panic(error):
            raise UserError(f"{what}: the tokenizers library gave up ({str(error).strip():.200}); {_REMEDY}") from error
        raise


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a Rust library; its class derives directly from BaseException."""
    return any(kind.__name__ == "PanicException" for kind in type(error).__mro__)


def _ids_of_tokenizer(content: dict[str, Any]) -> Iterator[Any]:
    added, model = content.get("added_tokens"), content.get("model")
    yield from (token.get("id") for token in (added if isinstance(added, list) else ()) if isinstance(token, dict))
    yield from _values(model.get("vocab") if isinstance(model, dict) else None)
    # templates name ids too
    for part in _walk(content.get("post_processor")):
        ids = part.get("ids")
        yield from ids if isinstance(ids, list) else ()


def _values(vocab: Any) -> Iterator[Any]:
    # unigram models list their tokens in order: their ids are positions
    return iter(vocab.values() if isinstance(vocab, dict) else range(len(vocab)) if isinstance(vocab, list) else ())


def _keys(decoder: Any) -> Iterator[int]:
    names = decoder if isinstance(decoder, dict) else {}
    # a number with thousands of digits would itself take long to convert
    return (int(name) if len(name) < 40 else MOST_ID for name in names if name.isdecimal())


def _check_parts(file: Path, content: dict[str, Any]) -> None:
    """Refuse a normalizer or pre-tokenizer that makes text much longer, and a template that adds unknown tokens."""
    growth = 1.0
    for part in (*_walk(content.get("normalizer")), *_walk(content.get("pre_tokenizer"))):
        prefix, new, pattern = part.get("prepend"), part.get("content"), part.get("pattern")
        if isinstance(prefix, str) and len(prefix) > _MOST_ADDED:
            raise UserError(f"{file}: the normalizer puts {len(prefix):,} characters before each text; {_REMEDY}")
        if part.get("type") == "Replace" and isinstance(new, str):
            old = pattern.get("String") if isinstance(pattern, dict) else None
            # a chain of replacements multiplies: each may lengthen the result of the one before
            # a pattern that is a regular expression may match a single character
            growth *= max(1.0, len(new) / max(1, len(old) if isinstance(old, str) else 1))
    # written so that NaN and infinity are refused
    if not growth <= _MOST_GROWTH:
        raise UserError(f"{file}: the normalizer makes text up to {math.ceil(min(growth, 1e18)):,} times as long; {_REMEDY}")
    # without the post-processor, whose own ids are what is checked here
    highest = max((i for i in _ids_of_tokenizer({**content, "post_processor": None}) if isinstance(i, int)), default=0)
    for part in _walk(content.get("post_processor")):
        ids = part.get("ids")
        unknown = [i for i in ids if isinstance(i, int) and i > highest] if isinstance(ids, list) else []
        if unknown:
            raise UserError(f"{file}: the template adds the token {unknown[0]}, which the vocabulary does not have; {_REMEDY}")


def _walk(node: Any, depth: int = 20) -> Iterator[dict[str, Any]]:
    """Every JSON object in a part of the file, to a limited depth."""
    if isinstance(node, dict):
        yield node
    if depth:
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            if isinstance(value, dict | list):
                yield from _walk(value, depth - 1)
