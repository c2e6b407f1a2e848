"""Amounts of memory as people write them."""

import re

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def read_bytes(text: str) -> tuple[int, str] | None:
    """The bytes and the unit of '80GB', '24 GiB' or '85899345920' (unit ''); None for anything else, and for 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        return None
    return int(float(match[1]) * _UNITS[match[2].lower()]), match[2]
