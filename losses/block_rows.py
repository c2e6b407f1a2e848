"""Rows of logits that ``linear_divergence.chunked`` holds at once. It imports no torch, because plans count their memory."""

from dataclasses import dataclass

BUFFERS_WITH_TEACHER = 3
"""Buffers [n, V] that a block needs in addition to the logits of both models."""
BUFFERS_OF_AUTOGRAD = 9
"""Further buffers [n, V] that a divergence of the user's may hold: log-probabilities, their gradients, and a few intermediate values."""
BUFFERS_ALONE = 1
"""Buffers [n, V] that a block without a teacher needs in addition to its logits."""
FEWEST_ROWS = 64
"""With fewer rows matrix products become slow, as each block reads the whole head; a very large vocabulary exceeds the budget instead."""


@dataclass(frozen=True)
class BlockLimits:
    """Limits on the size of a block."""

    budget_bytes: int
    """Bytes of all [rows, V] buffers together."""
    most_rows: int | None = None
    """Number of rows above which a block does not get faster; None = no limit."""


CPU_LIMITS = BlockLimits(3 * 2**25, 512)
"""Measured with vocabularies of 4,096 to 262,144 (docs/lab-book.md): fewer rows slow matrix products down, more rows gain nothing."""
ACCELERATOR_LIMITS = BlockLimits(2**29)
"""Enough rows for fast matrix products, and small compared with the weights of a model."""


def rows_per_block(rows: int, v_eff: int, buffers: int, itemsize: int, limits: BlockLimits) -> int:
    """Rows per block: as many as ``limits`` allow, at least ``FEWEST_ROWS``, in blocks of nearly equal size.

    Args:
        rows: Number of unmasked rows.
        v_eff: Size of the vocabulary.
        buffers: Number of [rows, V] buffers held at once.
        itemsize: Bytes per element.
        limits: Bytes of all buffers together, and rows.
    """
    # ``FEWEST_ROWS`` may exceed the budget: with fewer rows the products would be slow
    most = max(FEWEST_ROWS, limits.budget_bytes // (v_eff * buffers * itemsize))
    if limits.most_rows is not None:
        most = min(most, limits.most_rows)
    # equal blocks, because a small last one would be slow for its number of rows
    blocks = max(1, -(-rows // most))
    return max(1, -(-rows // blocks))
