"""What may reach a terminal: names, messages and answers come from files, servers and people, and may hold anything."""

import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")


def printable(text: str) -> str:
    r"""``text`` for a terminal or log: control characters (but line ends and tabs), marks that turn writing round and bytes that are not
    UTF-8 as escapes (``\x1b``), and no name or password in an address."""
    return _PASSWORD.sub("***@", _UNSAFE.sub(_escaped, text))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    # a byte that is not UTF-8 comes as a surrogate, and is shown as the byte that it is
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
