"""Finds the order in which the linears of a decoder layer run, and which of them end a part of the layer, by running it on one window.

Later linears are calibrated on the outputs of the earlier ones after rounding, inside a layer and from layer to layer (the "true
sequential" order of the code of Frantar et al., arXiv 2210.17323).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .replay import Part, Replay
from .token_rows import linear_input, token_rows

_TOKENS = 16
"""Length of the window on which a layer is examined: the order does not depend on it."""


@dataclass
class Step:
    """Linears that read the same tensor object, such as the projections to queries, keys and values."""

    names: list[str]
    """Full module names, in the order in which they run."""
    part: Part | None = None
    """For a step of one linear: the outermost module in the layer with that linear's output, such as the attention around its output
    projection; None if there is none."""


def steps_of(replay: Replay, index: int, layer: nn.Module, linears: Mapping[str, nn.Linear]) -> list[Step] | None:
    """The steps of layer ``index`` in the order in which they run.

    Args:
        linears: Linears of that layer, by full name.

    Returns:
        The steps, or None if the layer does not run each linear exactly once on one vector per token (layers with experts, for example).
    """
    seen = _Seen()
    hooks = [linear.register_forward_hook(seen.linear(name), with_kwargs=True) for name, linear in linears.items()]
    # candidates for ``Step.part`` are modules with children: a leaf has no inner linear whose output it could return
    own = {id(linear) for linear in linears.values()} | {id(layer)}
    parts = [module for module in layer.modules() if id(module) not in own and next(module.children(), None) is not None]
    hooks += [module.register_forward_hook(seen.part) for module in parts]
    try:
        # one row of the first batch
        replay.run(index, 0, few=(1, _TOKENS))
    finally:
        for hook in hooks:
            hook.remove()
    shape = (1, min(_TOKENS, replay.shape(0)[1]))
    # sorted with repeats: a linear that ran twice, or not at all, has no place in one order
    if sorted(name for name, _, _ in seen.linears) != sorted(linears):
        return None
    # experts read some tokens only, so their inputs are no rows per token
    if any(token_rows(given, None, shape) is None for _, given, _ in seen.linears):
        return None
    return seen.steps()


@dataclass
class _Seen:
    """Tensors seen by the hooks. They are kept alive because a new tensor could otherwise get the identity of a freed one."""

    linears: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    """(name, input, output) in the order in which they ran."""
    versions: dict[str, int] = field(default_factory=dict)
    """Version counter of each output when its linear returned it; changes in place raise the counter."""
    parts: list[tuple[nn.Module, Any]] = field(default_factory=list)
    """(module, output) of modules that return the unchanged output of a linear, inner modules before outer ones."""

    def linear(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        """Forward hook of a linear."""

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.linears.append((name, linear_input(args, kwargs), output))
            # read at once: a later module may change the output in place
            self.versions[name] = output._version

        return look

    def part(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        """Forward hook of all other modules."""
        tensor = _first(output)
        # the same tensor, unchanged: then the module adds nothing to its linear's output
        if any(tensor is given and tensor._version == self.versions[name] for name, _, given in self.linears):
            self.parts.append((module, output))

    def steps(self) -> list[Step]:
        """The linears grouped by their input, in the order in which they ran."""
        found: list[tuple[Tensor, Step]] = []
        for name, given, _ in self.linears:
            known = next((step for tensor, step in found if tensor is given), None)
            if known is None:
                found.append((given, Step([name])))
            else:
                known.names.append(name)
        for name, _, output in self.linears:
            step = next(step for _, step in found if name in step.names)
            around = [Part(module, name, _nothing_else(whole)) for module, whole in self.parts if _first(whole) is output]
            if len(step.names) == 1 and around:
                # the outermost one: it spares the most work in later passes
                step.part = around[-1]
        return [step for _, step in found]


def _first(output: Any) -> Any:
    """The tensor that a module returns; None if it returns anything else with it."""
    if isinstance(output, tuple):
        return output[0] if output and all(more is None for more in output[1:]) else None
    return output


def _nothing_else(output: Any) -> int | None:
    """Number of Nones that a module returns in a tuple with its tensor; None if it returns the bare tensor."""
    return len(output) - 1 if isinstance(output, tuple) else None
