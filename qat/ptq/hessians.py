"""What the linears of a layer are given by calibration text: second moments of their inputs, one for all that share an input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.common.errors import NonFiniteError, UserError
from ..layers.token_rows import token_rows
from .replay import Advance, Enough, Replay

_BLOCK = 256  # columns of x x^T at a time: of a symmetric matrix only half is worth computing


@dataclass
class SharedInput:
    """Linears that read the very same tensor, such as the projections to queries, keys and values."""

    names: list[str]
    """Full module names, in the order in which they run."""
    moments: Tensor
    """fp32: H = 2/N sum x x^T [in, in], or its diagonal [in]; N unmasked tokens."""


def shared_inputs(
    replay: Replay, index: int, linears: Mapping[str, nn.Linear], whole: bool, advance: Advance,
    store: list[Tensor] | None = None, once: bool = False,
) -> list[SharedInput]:  # fmt: skip
    """Run layer ``index`` over all batches and sum what its linears read.

    Args:
        linears: Linears of that layer, by full name.
        whole: Sum x x^T; false: its diagonal alone.
        advance: Told the tokens of every batch that is done.
        store: Takes the inputs of the only linear, one of each batch, on the CPU.
        once: Whether they are known to run exactly once a pass, which may then end with the last of them.

    Raises:
        UserError: a linear does not run, or reads something else than a vector for each token.
        NonFiniteError: an input is NaN or infinite.
    """
    sums = _Sums(whole, once)
    tokens = 0
    for number, kept in replay.batches():
        watched = dict(linears) if number == 0 else {shared.names[0]: linears[shared.names[0]] for shared in sums.shared}
        sums.begin(len(watched), number == 0, replay.shape(number))
        handles = [linear.register_forward_pre_hook(sums.adder(name, number == 0, kept)) for name, linear in watched.items()]
        try:
            replay.run(index, number)
        finally:
            for handle in handles:
                handle.remove()
        if store is not None and sums.latest is not None:
            store.append(sums.latest.to("cpu"))
        sums.latest = None
        sums.seen.clear()
        tokens += replay.tokens(number)
        advance(replay.tokens(number))
    return sums.result(linears, tokens)


class _Sums:
    def __init__(self, whole: bool, once: bool) -> None:
        self.whole, self._once = whole, once
        self.shared: list[SharedInput] = []
        self.seen: list[tuple[Tensor, SharedInput]] = []
        """Inputs of the current batch; kept alive, so that no other tensor can be taken for one of them."""
        self.latest: Tensor | None = None
        """What was looked at last."""
        self.shape: tuple[int, ...] = ()
        self._expected = self._calls = 0
        self._stops = False
        """Whether a batch may end with the last input that is looked at: every linear ran exactly once in the first batch."""

    def begin(self, hooks: int, first: bool, shape: tuple[int, ...]) -> None:
        """A batch [B, S] of that shape begins, with that many linears watched."""
        self.shape = shape
        self._stops = self._once or (not first and (self._stops or self._calls == self._expected))
        self._expected, self._calls = hooks, 0

    def adder(self, name: str, first: bool, kept: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Pre-hook that finds who shares the input (``first`` batch) and adds what ``kept`` [B, S] leaves of it."""

        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            look(inputs[0])
            self.latest = inputs[0]
            self._calls += 1
            if self._stops and self._calls == self._expected:
                raise Enough

        def look(given: Tensor) -> None:
            if first:
                known = next((shared for tensor, shared in self.seen if tensor is given), None)
                if known is not None:
                    known.names.append(name)
                    return
                width = given.shape[-1]
                moments = torch.zeros((width, width) if self.whole else (width,), dtype=torch.float32, device=given.device)
                shared = SharedInput([name], moments)
                self.shared.append(shared)
                self.seen.append((given, shared))
            else:
                shared = next(shared for shared in self.shared if shared.names[0] == name)
            rows = token_rows(given, kept, self.shape)
            if rows is None and given.ndim == 3 and kept is None and not self._once:
                rows = given.flatten(0, 1)  # a part of the tokens at a time, all of them in the end
            if rows is None:
                part = given.ndim == 3 and given.shape[0] == self.shape[0]
                what = f"{given.shape[1]} of {self.shape[1]} tokens at a time" if part else f"a tensor of shape {tuple(given.shape)}"
                raise UserError(
                    f"{name} reads {what}, not one vector for each token, and cannot be calibrated; "
                    "add it to skip, or use method rtn, or mse without weighted"
                )
            rows = rows.to(torch.float32)
            if self.whole:
                for at in range(0, rows.shape[1], _BLOCK):
                    shared.moments[at : at + _BLOCK, at:].addmm_(rows[:, at : at + _BLOCK].T, rows[:, at:])
            else:
                shared.moments.add_(rows.square().sum(0))

        return add

    def result(self, linears: Mapping[str, nn.Linear], tokens: int) -> list[SharedInput]:
        """The finished sums, checked."""
        ran = {name for shared in self.shared for name in shared.names}
        if idle := [name for name in linears if name not in ran]:
            raise UserError(
                f"{idle[0]} ({len(idle)} in all) took no part in running the calibration text, so nothing is known of its inputs; "
                "add it to skip, or use method rtn, or mse without weighted"
            )
        for shared in self.shared:
            shared.moments.mul_(2.0 / tokens)
            if self.whole:
                for at in range(0, len(shared.moments), _BLOCK):
                    shared.moments[at + _BLOCK :, at : at + _BLOCK] = shared.moments[at : at + _BLOCK, at + _BLOCK :].T
            diagonal = shared.moments.diagonal() if self.whole else shared.moments
            # no entry of x x^T can overflow before one of its diagonal does
            if not bool(torch.isfinite(diagonal).all()):
                raise NonFiniteError(
                    f"the inputs of {shared.names[0]} are NaN, infinite or too large to square on the calibration text; the model, or a "
                    "layer that was rounded before, overflows: take an earlier checkpoint, or more bits"
                )
        return self.shared
