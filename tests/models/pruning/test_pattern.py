"""N:M patterns: what is one, what is none, and which linears it fits."""

import re

import pytest

from decoct.models.common.errors import UserError
from decoct.models.pruning.pattern import Pattern, parse_pattern


@pytest.mark.parametrize(("text", "kept", "group"), [("2:4", 2, 4), (" 1 : 2 ", 1, 2), ("5:7", 5, 7), ("127:128", 127, 128)])
def test_patterns_are_read(text: str, kept: int, group: int) -> None:
    pattern = parse_pattern(text)
    assert (pattern.kept, pattern.group, pattern.share) == (kept, group, kept / group)
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["", "2", "2:", "2:3:4", "two:four", "-2:4", "2.0:4", "2/4", "0x2:4"])
def test_what_is_no_pattern_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=rf"pattern={re.escape(repr(text))} must be two whole numbers N:M, such as 2:4"):
        parse_pattern(text)


def test_numbers_in_the_wrong_order_are_turned_round_in_the_message() -> None:
    with pytest.raises(ValueError, match="pattern='4:2' keeps 4 of 2 weights; the first number is what stays: write 2:4"):
        parse_pattern("4:2")


@pytest.mark.parametrize("text", ["0:4", "4:4", "1:129", "0:0"])
def test_patterns_that_keep_all_or_nothing_or_are_too_long_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must keep at least 1 and fewer than all of at most 128 weights"):
        parse_pattern(text)


def test_widths_are_refused_by_name_with_groups_that_fit() -> None:
    Pattern(2, 4).check_widths({"a": 64, "b": 12})
    told = r"pattern 2:4: b has 18 inputs, which groups of 4 do not divide; groups of 2 divide all inputs; use one of these, or keep"
    with pytest.raises(UserError, match=told):
        Pattern(2, 4).check_widths({"a": 64, "b": 18})
    with pytest.raises(UserError, match=r"b has 17 inputs, .* do not divide \(2 linears in all\); use keep without a pattern"):
        Pattern(2, 4).check_widths({"a": 64, "b": 17, "c": 19})
