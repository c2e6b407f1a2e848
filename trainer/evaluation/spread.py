"""How far a figure on held-out text may be off: standard errors over blocks of the text, also of the difference of two models.

A figure is a ratio: a sum over tokens, divided by the number of tokens. Its standard error is that of a ratio estimator with blocks as
units (Cochran 1977, Sampling Techniques, 3rd ed., eq. 6.9, without the correction for a finite population). Tokens of one block depend on
each other, so tokens are no units.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_BLOCKS = 128
"""Largest number of blocks; with more windows a block is several windows in a row."""
CLEAR = 2.0
"""Two figures differ when they are more than this many standard errors of their difference apart."""
EVAL_FIGURES = ("perplexity", "perplexity_se", "kl", "kl_se", "kl_p99", "top1", "top1_se", "ece")
"""Figures of ``EvalResult`` that a row of the report has under ``eval``."""
Blocks = dict[str, list[float] | None]
"""``tokens`` and the sum over the tokens of each block, for each figure (``nll``, ``kl``, ``top1``); None for one without a teacher."""


def block_sums(windows: Sequence[int], figures: dict[str, np.ndarray | None]) -> Blocks:
    """Sums over blocks of windows in a row.

    Args:
        windows: Number of predicted tokens of each window.
        figures: One number per predicted token, [N], in the order of the windows.
    """
    number = min(len(windows), MOST_BLOCKS)
    block = np.repeat(np.arange(len(windows)) * number // max(len(windows), 1), windows)
    counted = {"tokens": np.ones(len(block)), **figures}
    return {
        # six digits are far below the standard error, and keep reports short
        name: None if values is None else [float(f"{x:.6g}") for x in np.bincount(block, values.astype(np.float64), number)]
        for name, values in counted.items()
    }


def standard_error(sums: Sequence[float] | None, tokens: Sequence[float] | None) -> float | None:
    """Standard error of ``sum(sums) / sum(tokens)``; None with fewer than two blocks, or where it is not a number.

    Args:
        sums: Sum of the figure over each block.
        tokens: Tokens of each block. Blocks without tokens do not count.
    """
    if sums is None or tokens is None:
        return None
    x, n = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    units = int((n > 0).sum())
    if units < 2 or not np.isfinite(x).all():
        return None
    rest = x - x.sum() / n.sum() * n
    return float(math.sqrt(units / (units - 1) * float((rest**2).sum())) / n.sum())


def paired_error(first: Blocks | None, second: Blocks | None, figure: str) -> float | None:
    """Standard error of the difference of a figure of two models on the same blocks; None when the blocks are not the same.

    It is far smaller than the errors of both: a block that is hard is hard for both models.
    """
    if not first or not second or first.get("tokens") != second.get("tokens"):
        return None
    ours, theirs = first.get(figure), second.get(figure)
    if ours is None or theirs is None:
        return None
    # infinities are null in stored rows, and NaN here
    return standard_error((np.array(theirs, dtype=np.float64) - np.array(ours, dtype=np.float64)).tolist(), first["tokens"])


def is_clear(difference: float, error: float | None) -> bool | None:
    """Whether a difference is more than chance; None when nothing is known about its error."""
    # a difference that is not a number is none that chance explains
    return None if error is None else not abs(difference) <= CLEAR * error


def errors_of(blocks: Blocks, perplexity: float) -> dict[str, Any]:
    """``perplexity_se``, ``kl_se`` and ``top1_se`` of a model's figures; None where there is none."""
    tokens = blocks["tokens"]
    nll = standard_error(blocks["nll"], tokens)
    return {
        # the perplexity is exp of the mean: its error is that of the mean times its slope
        "perplexity_se": None if nll is None or not math.isfinite(perplexity) else perplexity * nll,
        "kl_se": standard_error(blocks["kl"], tokens),
        "top1_se": standard_error(blocks["top1"], tokens),
    }
