"""The widths that were chosen for the modules of a model, as a table of kinds and layers. It imports no torch."""

from collections import Counter
from collections.abc import Mapping
from typing import Any


def by_kind(widths: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Kind of linear -> layer -> width. Of experts, which have one width together, the first counts; names without a layer are left out."""
    found: dict[str, dict[int, int]] = {}
    for name, width in widths.items():
        parts = name.split(".")
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        if numbers:
            # the first number is that of the layer, a second one that of an expert
            kind = ".".join(part for part in parts[numbers[0] + 1 :] if not part.isdigit())
            found.setdefault(kind, {}).setdefault(int(parts[numbers[0]]), width)
    return found


def choice_lines(choice: Mapping[str, Any]) -> list[str]:
    """What a stage says of its choice (``bits`` of its record): the sum, and one line per kind with the widths of its layers in order."""
    counts = Counter(choice["widths"].values())
    spread = ", ".join(f"{count} in {'16 (left alone)' if width == 16 else width}" for width, count in sorted(counts.items()))
    kinds = by_kind(choice["widths"])
    column = max((len(kind) for kind in kinds), default=0)
    return [
        f"widths within {choice['budget']}: {choice['bits_per_weight']:.3f} bits per weight, {choice['bytes']:,} bytes as served; "
        f"modules: {spread}",
        f"sensitivity {choice['sensitivity']} on {choice['tokens']:,} tokens, KL there estimated {choice['estimated_kl']:.4g}, measured "
        + ", ".join(f"{kl:.4g} ({name})" for name, kl in choice["calibration_kl"].items())
        + "".join(f"; rank correlation of {names} {value:.3f}" for names, value in choice["rank_correlation"].items()),
        *(f"  {kind:<{column}}  {' '.join(str(width) for _, width in sorted(layers.items()))}" for kind, layers in kinds.items()),
    ]
