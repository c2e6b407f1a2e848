"""Attention relations of MiniLM: how similar the queries, keys or values of tokens are, compared between student and teacher."""

import math

import torch
from torch import Tensor


def relation_divergence(student: Tensor, teacher: Tensor, visible: Tensor, heads: int) -> Tensor:
    """KL(teacher || student) of the relations of each token of one sequence (MiniLMv2, arXiv 2012.15828; value relations: 2002.10957).

    A vector is cut into ``heads`` parts of D numbers. For part x of token i, the relation is the distribution softmax over the visible
    tokens j of x_i . x_j / sqrt(D). The number of attention heads does not matter, and the widths of both models may differ.

    Args:
        student: [S, W_s] queries, keys or values of a sequence, any floating dtype.
        teacher: [S, W_t] those of the teacher; no gradient flows into them.
        visible: [S, S] bool, True where token i (row) may see token j. Each row sees itself.
        heads: Relation heads; divides both widths.

    Returns:
        [S], the mean over heads, in nats; fp32 (fp64 if ``student`` is fp64).

    Raises:
        ValueError: the shapes do not fit each other, or ``heads`` does not divide a width.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or visible.shape != (len(student), len(student)):
        raise ValueError(
            f"relations need vectors [S, W] of the same tokens and a mask [S, S], not {tuple(student.shape)}, {tuple(teacher.shape)} "
            f"and {tuple(visible.shape)}"
        )
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        log_q = _log_relation(student.to(dtype), visible, heads)
        log_p = _log_relation(teacher.detach().to(dtype), visible, heads)
        # 0 where p is 0, also at hidden tokens, whose logarithms are -inf in both and whose difference would be NaN
        parts = torch.where(visible, log_p.exp() * (log_p - log_q.masked_fill(~visible, 0.0)).masked_fill(~visible, 0.0), 0.0)
        return parts.sum(2).mean(0)


def _log_relation(vectors: Tensor, visible: Tensor, heads: int) -> Tensor:
    """Log-probabilities [heads, S, S]; -inf at hidden tokens."""
    width = vectors.shape[1]
    if width % heads:
        raise ValueError(f"{heads} relation heads do not divide vectors of {width} numbers")
    # [S, W] -> [heads, S, D]
    parts = vectors.view(len(vectors), heads, width // heads).transpose(0, 1)
    scores = parts @ parts.transpose(1, 2) / math.sqrt(width // heads)
    return scores.masked_fill(~visible, -torch.inf).log_softmax(2)


def visible_tokens(batch_positions: Tensor | None, attention_mask: Tensor | None, length: int) -> Tensor:
    """Which tokens a token of one sequence may see: those before it and itself, in its own document and not padding.

    Args:
        batch_positions: [S] int64 positions that start at 0 with each packed document; None = one document.
        attention_mask: [S] int64, 0 for padding; None = no padding. A padded token sees itself alone.
        length: S.

    Returns:
        [S, S] bool.
    """
    given = batch_positions if batch_positions is not None else attention_mask
    device = None if given is None else given.device
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if batch_positions is not None:
        # a document begins where the positions do not go on
        document = (batch_positions.diff(prepend=batch_positions[:1]) != 1).cumsum(0)
        seen &= document[:, None] == document[None]
    if attention_mask is not None:
        real = attention_mask.bool()
        seen &= real[:, None] & real[None]
    return seen | torch.eye(length, dtype=torch.bool, device=device)
