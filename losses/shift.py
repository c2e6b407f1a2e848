"""The causal shift: position i predicts the token at i + 1. No other module shifts."""

from torch import Tensor

MASKED = -100
"""Label of a position at which no token is predicted."""


def shift_for_next_token(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Lines up hidden states with the labels that they predict.

    Drops the last position of every row, which has no successor, and the first label, which has no predecessor.

    Args:
        hidden: [B, S, H] hidden states (or logits), any dtype.
        labels: [B, S] int64 token ids of the same positions, -100 where no token is to be predicted.

    Returns:
        (hidden [B * (S - 1), H], labels [B * (S - 1)]), flattened row by row.

    Raises:
        ValueError: hidden states and labels do not cover the same positions.
    """
    if hidden.ndim != 3 or hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"hidden states of shape {tuple(hidden.shape)} and labels of shape {tuple(labels.shape)} must be [B, S, H] and [B, S] "
            "with the same B and S; pass labels as they come out of the data, not shifted"
        )
    # [B, S, H] -> [B, S - 1, H] -> [B (S - 1), H], and labels [B, S] -> [B (S - 1)]
    return hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
