"""Largest magnitude of each input channel of some linears of a layer on calibration text."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import NonFiniteError, UserError
from .replay import Advance, Replay
from .token_rows import linear_input, token_rows


def channel_maxima(replay: Replay, index: int, linears: Mapping[str, nn.Module], advance: Advance) -> dict[str, Tensor]:
    """Runs layer ``index`` over all batches; name -> fp32 [in], max |x| over the tokens of the text without padding.

    Args:
        replay: Runs the layer.
        index: Number of the layer.
        linears: Linears of that layer, by full name.
        advance: Called with the number of tokens after every batch.

    Raises:
        UserError: a linear does not run, or reads something other than one vector per token.
        NonFiniteError: an input is NaN or infinite.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str, kept: Tensor | None, shape: tuple[int, ...]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = token_rows(linear_input(args, kwargs), kept, shape)
            if rows is None:
                raise UserError(f"{name} does not read one vector per token, and cannot be calibrated; {replay.remedies.linear}")
            # a batch of padding alone has no rows
            if len(rows):
                most = rows.abs().amax(0).to(torch.float32)
                found[name] = torch.maximum(found[name], most) if name in found else most

        return look

    for number, kept in replay.batches():
        handles = [
            linear.register_forward_pre_hook(watch(name, kept, replay.shape(number)), with_kwargs=True) for name, linear in linears.items()
        ]
        try:
            replay.run(index, number)
        finally:
            for handle in handles:
                handle.remove()
        advance(replay.tokens(number))
    if idle := [name for name in linears if name not in found]:
        raise UserError(f"{idle[0]} did not run on the calibration text, so nothing is known of its inputs; {replay.remedies.linear}")
    for name, most in found.items():
        if not bool(torch.isfinite(most).all()):
            raise NonFiniteError(f"the inputs of {name} are NaN or infinite on the calibration text. {replay.remedies.overflow}")
    return found
