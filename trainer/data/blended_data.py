"""The text of a blend, of its parts that are each prepared by themselves: a weight that changes tokenizes nothing again."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ...models.common.files import sha256_json
from ..settings import DataSettings
from ..settings_text import token_shares
from .blend import Blend, largest_remainder, window_counts
from .joined_windows import JoinedWindows, tokens_of
from .prepared_data import PreparedData
from .windows import Windows

FORMAT = 1
"""Version of the mixing; raise it whenever the same parts and weights would give other windows."""


def blend_data(settings: DataSettings, parts: Sequence[PreparedData]) -> PreparedData:
    """Joins prepared texts in the shares of ``settings.blend``.

    Each part holds out as much as the whole would, whatever its weight; of that, its share of ``data.eval_tokens`` is measured.

    Args:
        settings: The blend.
        parts: Its parts, in order; those without a training side are measured alone.
    """
    assert settings.blend is not None
    names = tuple(settings.texts)
    of_tokens = token_shares(settings.blend)
    train = [part.train for part in parts]
    means = [Fraction(max(1, windows.tokens), max(1, len(windows))) for windows in train]
    counts = window_counts(of_tokens, means)
    sizes = tuple(map(len, train))
    measured = _measured(settings, of_tokens, [part.evaluation for part in parts])
    facts = {
        "blend": FORMAT,
        "parts": [part.fingerprint for part in parts],
        "counts": counts,
        "measured": measured,
    }
    shares = Blend(names, sizes, counts)
    listed = "; ".join(f"{name} ({float(share):.1%}): {part.description}" for name, share, part in zip(names, of_tokens, parts))
    return PreparedData(
        train=JoinedWindows(train, shares),
        evaluation=JoinedWindows([part.evaluation for part in parts], Blend(names, measured, counts)),
        fingerprint=sha256_json(facts),
        text_fingerprint=sha256_json([part.text_fingerprint for part in parts]),
        description=f"a blend of {listed}",
        samples=_samples(names, parts),
        left_out={f"{name}: {reason}": count for name, part in zip(names, parts) for reason, count in part.left_out.items()},
        path=parts[0].path.parent,
    )


def _measured(settings: DataSettings, of_tokens: Sequence[Fraction], held_out: Sequence[Windows]) -> tuple[int, ...]:
    """Windows of each part that are measured: its share of ``data.eval_tokens``, one at least, and no more than it holds out."""
    if settings.eval_tokens == "all":
        return tuple(map(len, held_out))
    wanted = largest_remainder(of_tokens, settings.eval_tokens)
    return tuple(_windows_with(windows, tokens) for windows, tokens in zip(held_out, wanted))


def _windows_with(windows: Windows, tokens: int) -> int:
    """How many of the first windows have about ``tokens`` real tokens."""
    low, high = 1, len(windows)
    while low < high:
        middle = (low + high + 1) // 2
        # half a window more or less: rounded to the nearest
        if tokens_of(windows, middle) - windows.seq_length // 2 <= tokens:
            low = middle
        else:
            high = middle - 1
    return low


def _samples(names: Sequence[str], parts: Sequence[PreparedData]) -> dict[str, Any] | None:
    """The conversations of all parts; None where all are text."""
    found = [(name, part.samples) for name, part in zip(names, parts) if part.samples is not None]
    if not found:
        return None
    first = next((f"{name}: {seen['first_bad']}" for name, seen in found if seen["bad"]), "")
    total = {key: sum(seen[key] for _, seen in found) for key in ("read", "bad")}
    return {**total, "first_bad": first}
