"""The inputs of a layer's linears in the order in which they run, each on the outputs of the linears before it as they are by then."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from .hessians import SharedInput, shared_inputs
from .limits import KEPT_BYTES
from .linear_order import Step, steps_of
from .replay import Advance, Replay


def calibrated_inputs(
    replay: Replay, index: int, layer: nn.Module, linears: Mapping[str, nn.Linear], *, whole: bool, last: bool, advance: Advance
) -> Iterator[SharedInput]:
    """Yields the second moments of every input of a layer. The caller changes the linears of one before it asks for the next.

    Args:
        replay: Runs the layer on the outputs of the layers before it.
        index: Number of the layer.
        layer: The layer.
        linears: Its linears to calibrate, by full name; looked up when they are needed, so that modules may be replaced meanwhile.
        whole: True sums x x^T, False only its diagonal.
        last: Whether no layer follows.
        advance: Called with work done; the total is the tokens of one pass.

    Raises: as ``shared_inputs``.
    """
    steps = steps_of(replay, index, layer, linears)
    once = steps is not None
    # without a known order, all linears are one step, calibrated on the layer as it is
    steps = steps or [Step(list(linears))]
    for number, step in enumerate(steps):
        # all linears of a step read the same tensor, so the first one is enough
        read = {name: linears[name] for name in (step.names[:1] if once else step.names)}
        needed = step.part is not None and not (last and number + 1 == len(steps)) and _keeps(replay, linears[step.names[0]])
        kept: list[Tensor] | None = [] if needed else None
        found = shared_inputs(replay, index, read, whole, _share(advance, number, len(steps)), kept, once)
        # the caller may replace the modules, and so free their weights
        del read
        for shared in found:
            yield SharedInput(step.names, shared.moments) if once else shared
        if kept and step.part is not None:
            # the part's last linear is final now, so later passes start from its kept inputs
            replay.shorten(step.part, kept)


def _keeps(replay: Replay, linear: nn.Linear) -> bool:
    """Whether the inputs of a linear are kept, so that later passes need not compute them again."""
    # fp32, 4 bytes each; inputs wider than the outputs (down_proj) only within the limit
    return linear.in_features <= linear.out_features or 4 * linear.in_features * replay.positions <= KEPT_BYTES


def _share(advance: Advance, part: int, parts: int) -> Advance:
    """Reports one ``parts``-th of the work it is called with. Rounded so that the shares of all parts add up to the whole."""
    return lambda done: advance(done * (part + 1) // parts - done * part // parts)
