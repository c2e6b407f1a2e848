"""The meaning of a scalar under its key: numbers with suffixes, percentages, true and false, choices, text.

1k = 1,000, 1M = 1,000,000, 1B = 1,000,000,000 (powers of 1000, as tokens are counted); 1_000 and 1e-4 are numbers; 5% = 0.05
for keys that take fractions. ``described_type`` says in words what a key takes.
"""

import math
import re
from dataclasses import fields, is_dataclass
from decimal import Decimal
from typing import Any, Literal, get_args, get_origin

from .. import alternatives, choices, recipe_key
from .nodes import Scalar, is_null

_NUMBER = re.compile(r"([+-]?)([0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]{1,3}))?([kMB%]?)")
_SUFFIXES = {"": Decimal(1), "k": Decimal(10**3), "M": Decimal(10**6), "B": Decimal(10**9), "%": Decimal("0.01")}
LARGEST_INT = 2**63 - 1
"""The largest whole number that a key takes: what 64 bits hold, with a sign."""


def parse_number(text: str) -> tuple[Decimal, bool] | None:
    """Return the exact value of a number as written in recipes, and whether it was a percentage; None if it is not a number."""
    # the bound keeps Decimal from working on megabytes of digits
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= 64 else None
    if match is None:
        return None
    sign, digits, exponent, suffix = match.groups()
    # exact: 0.1B is 100,000,000, which a float product need not give
    value = Decimal(f"{sign}{digits.replace('_', '')}e{exponent or 0}") * _SUFFIXES[suffix]
    return value, suffix == "%"


def read_scalar(scalar: Scalar, annotation: Any) -> Any:
    """Return the value of ``scalar`` for a key of type ``annotation``; text without a meaning there is returned unchanged.

    The result is not validated; the caller does that.
    """
    if is_null(scalar):
        return None
    options = alternatives(annotation)
    if isinstance(scalar.value, str):
        return _read_text(scalar.value, scalar.plain, annotation, options)
    # no key takes nan or inf: as text they are refused with the message of a wrong type
    if isinstance(scalar.value, float) and not math.isfinite(scalar.value):
        return str(scalar.value)
    # 1e6 in Python or JSON is a float, and means a number of tokens
    if type(scalar.value) is float and int in options and float not in options and scalar.value.is_integer():
        return int(scalar.value)
    # precision: 32 is given as a number in Python, and means the word
    if type(scalar.value) in (int, float) and str(scalar.value) in choices(annotation):
        return str(scalar.value)
    return scalar.value


def _read_text(text: str, plain: bool, annotation: Any, options: tuple[Any, ...]) -> Any:
    # words first: 32 is a word for trainer.precision and a number elsewhere
    if text in choices(annotation):
        return text
    # quoted text in a free section stays text, as in YAML
    if Any in options:
        return _read_free(text) if plain else text
    if bool in options and plain and text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if int in options or float in options:
        number = parse_number(text)
        if number is not None:
            return _as_type(*number, options, text)
    return text


def _as_type(value: Decimal, percentage: bool, options: tuple[Any, ...], text: str) -> int | float | str:
    # a number beyond 64 bits is a typing error
    whole = value == value.to_integral_value() and abs(value) <= LARGEST_INT
    if int in options and whole and not percentage:
        return int(value)
    if float in options and math.isfinite(float(value)):
        return float(value)
    return text


def _read_free(text: str) -> Any:
    """Return a value of YAML's core types, for free sections such as ``student.config``: no suffixes, no octal numbers."""
    if text in ("true", "false"):
        return text == "true"
    # a leading zero is octal in YAML 1.1 and stays text; the bound keeps int() from working on megabytes of digits
    if re.fullmatch(r"[+-]?(0|[1-9][0-9]*(?:_[0-9]+)*)", text) and len(text) < 20:
        return int(text)
    # free sections follow YAML, where 1k is a word
    number = parse_number(text) if text[-1:] not in "kMB%" else None
    if number is not None and re.search(r"[.eE]", text) and math.isfinite(float(number[0])):
        return float(number[0])
    return text


def described_type(annotation: Any) -> str:
    """Describe in words what a key of this type accepts."""
    words = [_describe(option) for option in alternatives(annotation) if option is not type(None)]
    return " or ".join(words)


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return _any_of([f"'{word}'" for word in get_args(option)])
    if get_origin(option) is tuple:
        inner = get_args(option)
        if inner[-1] is Ellipsis:
            return f"a list of {_plural(inner[0])}"
        return f"a list of {len(inner)} {_plural(inner[0])}"
    if is_dataclass(option):
        return f"a section with keys {', '.join(recipe_key(entry.name) for entry in fields(option))}"
    if get_origin(option) is dict:
        return "a section of keys and values"
    simple = {int: "a whole number (64, 500k, 2M)", float: "a number (0.1, 1e-4, 5%)", bool: "true or false", str: "text"}
    return simple.get(option, "a value")


def _plural(annotation: Any) -> str:
    option = alternatives(annotation)[0]
    if get_origin(option) is Literal:
        return f"{_any_of([repr(word) for word in get_args(option)])}"
    if get_origin(option) is tuple:
        return f"lists of {len(get_args(option))} {_plural(get_args(option)[0])}"
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(option, "values")


def _any_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
