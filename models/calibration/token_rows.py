"""Reads tensors with one vector per token in every shape that families use: [B, S, ...] or flattened to [B x S, ...]."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def linear_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a linear reads, from the arguments that a hook of it gets: the first one, or ``input`` by keyword."""
    return args[0] if args else kwargs["input"]


def with_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a linear with another input, as a pre-hook with keywords returns them."""
    changed = change(linear_input(args, kwargs))
    return ((changed, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "input": changed})


def token_rows(x: Tensor, text: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The vectors of ``x`` as rows [N, width], without padding.

    Args:
        x: [B, S, ..., width], or [B x S, ..., width] in the order of the batch (OPT's FFN, the shared expert of Qwen2-MoE); axes of size
            1 may be anywhere (MiniCPM3).
        text: bool [B, S], False for padding; None = all is text.
        shape: (B, S) of the batch.

    Returns:
        The rows, or None if ``x`` does not hold one or more vectors per token.
    """
    width, wanted = x.shape[-1], [size for size in shape if size != 1]
    sizes = [size for size in x.shape[:-1] if size != 1]
    tokens = math.prod(shape)
    # neither [B, S, ...] nor [B x S, ...]
    if sizes[: len(wanted)] != wanted and sizes[:1] != [tokens]:
        return None
    # [tokens, vectors per token, width], then without padding and flat: [N, width]
    rows = x.reshape(tokens, -1, width)
    return (rows if text is None else rows[text.flatten()]).reshape(-1, width)
