"""Formats bytes, counts and values for readers."""


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


def span(seconds: float) -> str:
    """Format a time: '45 s', '37 min', '12.3 h'."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def shown_value(value: object) -> str:
    """Format a setting: floats with six significant digits, so that 1e-05 is not shown as 9.999999999999999e-06; all else as it is."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown_value, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
