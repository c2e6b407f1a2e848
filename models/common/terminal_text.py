"""Makes text safe for a terminal: names, messages and answers come from files, servers and people and may contain anything."""

import re

# control characters without \t and \n; marks that reorder text; line separators that some terminals obey; surrogates; the byte-order mark
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")


def printable(text: str) -> str:
    r"""``text`` for a terminal or log.

    Control characters (except line ends and tabs), marks that change the direction of writing, and bytes that are not UTF-8 become escapes
    (``\x1b``); names and passwords in addresses become ``***``.
    """
    return _PASSWORD.sub("***@", _UNSAFE.sub(_escaped, text))


def printable_line(text: str) -> str:
    r"""``printable`` on one line: line ends, tabs and all other characters without a glyph are escaped too (``\n``)."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in printable(text))


def counted(count: int, thing: str) -> str:
    """A count with its noun: '1 layer', '1,024 layers'."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    # Python decodes a byte that is not UTF-8 into a surrogate: show the byte
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
