"""The order in which the linears of a decoder layer run, and which of them end a part of it: found by running it on one window.

Linears that run later are calibrated on what the earlier ones give once they are rounded, inside a layer as from layer to layer (the
"true sequential" order of the code of Frantar et al., arXiv 2210.17323).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layers.token_rows import token_rows
from .replay import Part, Replay

_TOKENS = 16
"""Of the window that layers are looked at on."""


@dataclass
class Step:
    """Linears that read the very same tensor, such as the projections to queries, keys and values."""

    names: list[str]
    """Full module names, in the order in which they run."""
    part: Part | None = None
    """The outermost part of the layer that gives what the one linear of this step gives, such as the attention of its output projection."""


def steps_of(replay: Replay, index: int, layer: nn.Module, linears: Mapping[str, nn.Linear]) -> list[Step] | None:
    """The steps of layer ``index`` in the order in which they run.

    Args:
        linears: Linears of that layer, by full name.

    Returns:
        None when the layer does not run each of them exactly once on vectors for each token, as layers with experts do not.
    """
    seen = _Seen()
    hooks = [linear.register_forward_hook(seen.linear(name)) for name, linear in linears.items()]
    own = {id(linear) for linear in linears.values()} | {id(layer)}
    parts = [module for module in layer.modules() if id(module) not in own and next(module.children(), None) is not None]
    hooks += [module.register_forward_hook(seen.part) for module in parts]
    try:
        replay.run(index, 0, few=(1, _TOKENS))
    finally:
        for hook in hooks:
            hook.remove()
    shape = (1, min(_TOKENS, replay.shape(0)[1]))
    if sorted(name for name, _, _ in seen.linears) != sorted(linears):
        return None
    if any(token_rows(given, None, shape) is None for _, given, _ in seen.linears):
        return None
    return seen.steps()


@dataclass
class _Seen:
    """Tensors are kept, so that no other can be taken for one of them."""

    linears: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    """(name, input, output) in the order in which they ran."""
    versions: dict[str, int] = field(default_factory=dict)
    """Of each output when its linear gave it: what is added in place later counts up."""
    parts: list[tuple[nn.Module, Any]] = field(default_factory=list)
    """(module, output) of those that give what a linear has given, untouched: inner modules before the ones around them."""

    def linear(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Forward hook of a linear."""

        def look(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.linears.append((name, inputs[0], output))
            self.versions[name] = output._version

        return look

    def part(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        """Forward hook of everything else."""
        tensor = _first(output)
        if any(tensor is given and tensor._version == self.versions[name] for name, _, given in self.linears):
            self.parts.append((module, output))

    def steps(self) -> list[Step]:
        found: list[tuple[Tensor, Step]] = []
        for name, given, _ in self.linears:
            known = next((step for tensor, step in found if tensor is given), None)
            if known is None:
                found.append((given, Step([name])))
            else:
                known.names.append(name)
        for name, _, output in self.linears:
            step = next(step for _, step in found if name in step.names)
            ends = [Part(module, name, _nothing_else(whole)) for module, whole in self.parts if _first(whole) is output]
            if len(step.names) == 1 and ends:
                step.part = ends[-1]
        return [step for _, step in found]


def _first(output: Any) -> Any:
    """The tensor that a module gives; None when it gives more than that."""
    if isinstance(output, tuple):
        return output[0] if output and all(more is None for more in output[1:]) else None
    return output


def _nothing_else(output: Any) -> int | None:
    """The Nones that a module returns beside its tensor; None when it returns the bare tensor."""
    return len(output) - 1 if isinstance(output, tuple) else None
