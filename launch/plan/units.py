"""Formats bytes and counts in readable units."""


def size(count: float) -> str:
    """Format bytes in a readable unit: '3.42 GB'."""
    for unit, width in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= width:
            return f"{count / width:.3g} {unit}"
    return f"{count:.0f} B"


def amount(count: float) -> str:
    """Format a count: '1.71B', '524k'."""
    for unit, width in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= width:
            return f"{count / width:.3g}{unit}"
    return f"{count:g}"
