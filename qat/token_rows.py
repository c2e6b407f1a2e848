"""Tensors that hold a vector for each token, whatever shape a family gives them: [B, S, ...] or flattened to [B x S, ...]."""

from torch import Tensor


def token_rows(x: Tensor, text: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The vectors of ``x`` as rows [N, width], padding left out.

    Args:
        x: [B, S, ..., width], or [B x S, ..., width] in the order of the batch (OPT's FFN, the shared expert of Qwen2-MoE).
        text: bool [B, S], False for padding; None = all is text.
        shape: (B, S) of the batch.

    Returns:
        None when ``x`` holds something else than one or more vectors for each token.
    """
    batch, length = shape
    if x.ndim >= 3 and tuple(x.shape[:2]) == (batch, length):
        kept = x if text is None else x[text]
    elif x.ndim >= 2 and x.shape[0] == batch * length:
        kept = x if text is None else x[text.flatten()]
    else:
        return None
    return kept.reshape(-1, x.shape[-1])
