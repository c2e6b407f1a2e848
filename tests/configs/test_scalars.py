"""Numbers as people write them, exactly; nothing else is a number."""

from decimal import Decimal
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoct.configs.nodes import Scalar
from decoct.configs.scalars import parse_number, read_scalar


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("1k", int, 1000),
        ("1.5B", int, 1_500_000_000),
        ("0.3M", int, 300_000),
        ("1_000", int, 1000),
        ("1e6", int, 1_000_000),
        ("-3", int, -3),
        ("010", int, 10),
        ("1e-4", float, 1e-4),
        (".5", float, 0.5),
        ("5%", float, 0.05),
        ("0.1%", float, 0.001),
        ("3", float, 3.0),
        ("2k", float, 2000.0),
        ("auto", int | Literal["auto"], "auto"),
        ("8", int | Literal["auto"], 8),
        ("32", Literal["32", "bf16-mixed"], "32"),
        ("true", bool, True),
        ("no", str | None, "no"),
        ("1e5", str | None, "1e5"),
        ("2020-01-01", str, "2020-01-01"),
        ("~", int | None, None),
        ("null", str | None, None),
        ("010", Any, "010"),
        ("0.5", Any, 0.5),
        ("1_000", Any, 1000),
    ],
)
def test_text_gets_the_meaning_of_its_key(text: str, annotation: Any, expected: object) -> None:
    found = read_scalar(Scalar(text, ""), annotation)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        *(
            (text, int)
            for text in (
                "1.5",
                "5%",
                "1m",
                "1K",
                "1 k",
                "0x10",
                "1e400",
                "1e9999999",
                "9" * 30,
                "1:30",
                "true",
                "1__0",
                "_1",
                "1_",
                "\u0663",
            )
        ),
        *((text, Any) for text in ("1_", "1__0", "-2_", "_1", "1_k")),
        *((text, float) for text in ("nan", "inf", "1e999", "1,5", "--1", "e5", ".", "%")),
        *((text, bool) for text in ("yes", "on", "1", "tRue")),
    ],
)
def test_text_without_a_meaning_is_left_for_validation_to_refuse(text: str, annotation: Any) -> None:
    assert read_scalar(Scalar(text, ""), annotation) == text


def test_quotes_make_text() -> None:
    assert read_scalar(Scalar("null", "", plain=False), str | None) == "null"
    assert read_scalar(Scalar("true", "", plain=False), bool) == "true"
    assert read_scalar(Scalar("1", "", plain=False), Any) == "1"
    # The command line hands on numbers as text.
    assert read_scalar(Scalar("500k", "", plain=False), int) == 500_000


@settings(deadline=None, max_examples=50)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_its_text(value: float) -> None:
    assert read_scalar(Scalar(repr(value), ""), float) == value


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**12), st.sampled_from(["k", "M", "B"]))
def test_suffixes_are_powers_of_1000(number: int, suffix: str) -> None:
    parsed = parse_number(f"{number}{suffix}")
    assert parsed == (Decimal(number) * {"k": 10**3, "M": 10**6, "B": 10**9}[suffix], False)
