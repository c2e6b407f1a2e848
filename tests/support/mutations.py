"""Damage for files that people hand us: changes of bytes, and of values inside JSON. Loaded by path: tests are no package."""

import copy
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63 - 1, 2**64, -(2**40), 0.5, 1e308, "", "x", "..", "../a", "/etc/passwd", "re:(a+)+$",
    "re:(", "re:" + ".*" * 300, "\0", "I32", "F32", "é" * 50, [], {}, [[]], [0, 0], [2**40, 0], [0, 2**40], [-1, 4], ["a"], {"a": {}},
    {"": None}, [[[[1]]]], "Linear", "group", "gptq_v2", "int-quantized", "mixed-precision",
    float("nan"), float("inf"), -float("inf"), 10**30, "x" * 5000, "\ud800", "../../../../etc/passwd",
    "[red]x[/red]", "\x1b[2J", "{{ self.__init__.__globals__ }}",
]  # fmt: skip
TOKENS = [b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\\ud800", b"\xef\xbb\xbf", b"\x00" * 64, b"1e999", b"Infinity"]
TOKENS += b'" { } [ ] , : 0 9999999999999999999999 - 1e9 NaN null \\u0000 \xff ../ "a":1,"a":2'.split()


def mutated_bytes(chosen: random.Random, raw: bytes) -> bytes:
    """One to four changes of bytes: flipped, inserted, removed, doubled, swapped for a token, cut off."""
    data = bytearray(raw)
    for _ in range(chosen.randrange(1, 5)):
        at, length = chosen.randrange(len(data) + 1), chosen.randrange(1, 40)
        match chosen.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chosen.randrange(8)
            case 1:
                data[at:at] = chosen.choice(TOKENS)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = chosen.choice(TOKENS)
            case _:
                del data[max(1, len(data) - chosen.randrange(1, 8)) :]
        if not data:
            data = bytearray(b"{")
    return bytes(data)


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    inner = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [(node, key) for key, _ in inner] + [place for _, value in inner for place in places(value)]


def mutated_json(chosen: random.Random, content: Any) -> Any:
    """One to three values swapped for odd ones, removed, or put under another's key."""
    content = copy.deepcopy(content)
    for _ in range(chosen.randrange(1, 4)):
        where = places(content)
        if not where:
            break
        container, key = chosen.choice(where)
        action = chosen.random()
        if action < 0.7:
            container[key] = copy.deepcopy(chosen.choice(ODD))
        elif action < 0.85:
            del container[key]
        else:
            other, name = chosen.choice(where)
            with suppress(KeyError, IndexError):
                container[key] = copy.deepcopy(other[name])
    return content


def raw_header(file: Path) -> tuple[bytes, bytes]:
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    return whole[8 : 8 + length], whole[8 + length :]
