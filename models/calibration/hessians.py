"""Second moments of the inputs of a layer's linears on calibration text, one for all linears that share an input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import NonFiniteError, UserError
from .replay import Advance, Enough, Remedies, Replay
from .token_rows import linear_input, token_rows

_BLOCK = 256  # columns of x x^T per product: x x^T is symmetric, so blocks left of the diagonal are copied, not computed


@dataclass
class SharedInput:
    """Linears that read the same tensor object, such as the projections to queries, keys and values."""

    names: list[str]
    """Full module names, in the order in which they run."""
    moments: Tensor
    """fp32: H = 2/N sum x x^T [in, in], or its diagonal [in], over N unmasked tokens."""


def shared_inputs(
    replay: Replay, index: int, linears: Mapping[str, nn.Linear], whole: bool, advance: Advance,
    store: list[Tensor] | None = None, once: bool = False,
) -> list[SharedInput]:  # fmt: skip
    """Runs layer ``index`` over all batches and sums the second moments of its linears' inputs.

    Args:
        replay: Runs the layer.
        index: Number of the layer.
        linears: Linears of that layer, by full name.
        whole: True sums x x^T, False only its diagonal.
        advance: Called with the number of tokens after every batch.
        store: With one linear: receives its inputs, one tensor per batch, on the CPU.
        once: Whether each linear is known to run exactly once per pass, so that a pass may end at the last of them.

    Raises:
        UserError: a linear does not run, or reads something other than one vector per token.
        NonFiniteError: an input is NaN or infinite.
    """
    sums = _Sums(whole, once, replay.remedies)
    tokens = 0
    for number, kept in replay.batches():
        # the first batch shows which linears share an input; afterwards one of each group is watched
        watched = dict(linears) if number == 0 else {shared.names[0]: linears[shared.names[0]] for shared in sums.shared}
        sums.begin(len(watched), number == 0, replay.shape(number))
        handles = [
            linear.register_forward_pre_hook(sums.adder(name, number == 0, kept), with_kwargs=True) for name, linear in watched.items()
        ]
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
    """The sums while batches run. ``whole`` and ``once`` as for ``shared_inputs``."""

    def __init__(self, whole: bool, once: bool, remedies: Remedies) -> None:
        self.whole, self._once, self._remedies = whole, once, remedies
        self.shared: list[SharedInput] = []
        self.seen: list[tuple[Tensor, SharedInput]] = []
        """Inputs of the current batch. They are kept alive because a new tensor could otherwise get the identity of a freed one."""
        self.latest: Tensor | None = None
        """The input that was added last."""
        self.shape: tuple[int, ...] = ()
        self._expected = self._calls = 0
        self._stops = False
        """Whether a pass may end at the last watched input, because every linear ran exactly once in the first batch."""

    def begin(self, hooks: int, first: bool, shape: tuple[int, ...]) -> None:
        """Starts a batch of ``shape`` [B, S] with ``hooks`` watched linears."""
        self.shape = shape
        # an order that held in the first batch holds in the others: layers run the same code
        self._stops = self._once or (not first and (self._stops or self._calls == self._expected))
        self._expected, self._calls = hooks, 0

    def adder(self, name: str, first: bool, kept: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Pre-hook that finds the linears with the same input (in the ``first`` batch) and adds the tokens that ``kept`` [B, S] selects."""

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.latest = given = linear_input(args, kwargs)
            look(given)
            self._calls += 1
            # what runs behind the last watched linear adds nothing to the sums
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
            # [text tokens, in]
            rows = token_rows(given, kept, self.shape)
            if rows is None and given.ndim == 3 and kept is None and not self._once:
                # some modules pass their tokens through a linear in several parts: the sum over all calls is the same
                rows = given.flatten(0, 1)
            if rows is None:
                part = given.ndim == 3 and given.shape[0] == self.shape[0]
                what = f"{given.shape[1]} of {self.shape[1]} tokens at a time" if part else f"a tensor of shape {tuple(given.shape)}"
                raise UserError(f"{name} reads {what}, not one vector per token, and cannot be calibrated; {self._remedies.linear}")
            rows = rows.to(torch.float32)
            if self.whole:
                # only the blocks on and right of the diagonal; ``result`` mirrors them
                for at in range(0, rows.shape[1], _BLOCK):
                    shared.moments[at : at + _BLOCK, at:].addmm_(rows[:, at : at + _BLOCK].T, rows[:, at:])
            else:
                shared.moments.add_(rows.square().sum(0))

        return add

    def result(self, linears: Mapping[str, nn.Linear], tokens: int) -> list[SharedInput]:
        """Finishes the sums: scales them, mirrors them, and checks that they are complete and finite."""
        ran = {name for shared in self.shared for name in shared.names}
        if idle := [name for name in linears if name not in ran]:
            raise UserError(
                f"{idle[0]} ({len(idle)} in all) did not run on the calibration text, so nothing is known of its inputs; "
                f"{self._remedies.linear}"
            )
        for shared in self.shared:
            # H = 2/N sum x x^T, the Hessian of the mean squared output error
            shared.moments.mul_(2.0 / tokens)
            if self.whole:
                for at in range(0, len(shared.moments), _BLOCK):
                    shared.moments[at + _BLOCK :, at : at + _BLOCK] = shared.moments[at : at + _BLOCK, at + _BLOCK :].T
            diagonal = shared.moments.diagonal() if self.whole else shared.moments
            # |x_i x_j| is at most the larger of x_i^2 and x_j^2, so the diagonal overflows first and is enough to check
            if not bool(torch.isfinite(diagonal).all()):
                raise NonFiniteError(
                    f"the inputs of {shared.names[0]} are NaN, infinite or too large to square on the calibration text; the model, or "
                    f"what was made of a layer before, overflows. {self._remedies.overflow}"
                )
        return self.shared
