"""Nothing that steers a terminal, and no password, gets through; everything else does."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoct.models.common.terminal_text import printable, printable_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;pwn\x07", "\\x1b[2J\\x1b]0;pwn\\x07"),
        ("a\rb\x08", "a\\x0db\\x08"),
        ("\x9b31m", "\\x9b31m"),
        ("bad\udcff\udcfe.txt", "bad\\xff\\xfe.txt"),
        ("half \ud83d", "half \\ud83d"),
        ("abc\u202edcba", "abc\\u202edcba"),
        ("a\u2028b", "a\\u2028b"),
        ("line\nline\tend", "line\nline\tend"),
        ("日本 ünï 😀", "日本 ünï 😀"),
        ("cannot reach https://me:canary@host/v1 (http://canary@x)", "cannot reach https://***@host/v1 (http://***@x)"),
        ("mail me@host, http://host/a@b", "mail me@host, http://host/a@b"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_no_control_character_is_left_and_cleaning_twice_changes_nothing(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") or letter in "\n\t" for letter in shown)
    assert printable(shown) == shown
    shown.encode()


@given(st.text())
def test_one_line_stays_one_line_and_shows_plain_text_as_it_is(text: str) -> None:
    shown = printable_line(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable() or "://" in text
    assert printable_line("a\nb\tc\xa0d\udce9") == r"a\nb\tc\xa0d\xe9"
