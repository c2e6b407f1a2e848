"""Rounding the modules of one decoder layer after the other, and embedding and head before them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.common.errors import UserError
from ..codes.state import QuantState
from ..fake_quant import Encoded
from ..layers.quantized_model import fold
from ..ptq_limits import KEPT_BYTES
from ..spec import QuantSpec
from .error_report import KindError, kind_of, row_energy, sampled
from .hessians import SharedInput, shared_inputs
from .layer_storage import Shelf
from .linear_order import Step, steps_of
from .methods import METHODS, RoundingMethod, Stack, nearest
from .replay import Replay
from .served_layers import ServedLayers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Advance = Callable[[int], None]


class Walk:
    """What is gathered on the way."""

    def __init__(
        self, model: "PreTrainedModel", specs: Mapping[str, QuantSpec], rounding: RoundingMethod, sparse: frozenset[str], shelf: Shelf,
        replay: Replay | None, others: torch.dtype | None, advance: Advance,
    ) -> None:  # fmt: skip
        self.model, self.specs, self.rounding, self.sparse, self.shelf = model, specs, rounding, sparse, shelf
        self.replay, self.others, self._tell = replay, others, advance
        self._told = 0
        self.served = ServedLayers(model, rounding, replay, self.advance)
        self.encoded: dict[str, Encoded] = {}
        self.errors: dict[str, KindError] = {}
        self.notes: list[str] = []

    def advance(self, done: int) -> None:
        """Tell of work that is done."""
        self._told += done
        self._tell(done)

    def layer(self, index: int, layer: nn.Module, names: Sequence[str], last: bool) -> None:
        """Round one layer, and run it for the next."""
        self._told = 0
        self.shelf.bring(layer)
        linears = {name: _linear(self.model, name) for name in names}
        if self.others is not None:
            rounded_later = {id(linear.weight) for linear in linears.values()}
            take_values([parameter for parameter in layer.parameters() if id(parameter) not in rounded_later], self.others)
        for name in linears:
            self.errors.setdefault(kind_of(name), KindError())
        rounded: dict[str, Encoded] = {}
        if self.replay is None or self.rounding.needs == "nothing":
            for name in linears:
                self._stack([name], linears, None, rounded)
                self.advance(linears[name].weight.numel() if self.replay is None else 0)
            self._fold(rounded)
        elif linears:
            self._calibrated(index, layer, linears, rounded, last)
        ordered = {name: rounded[name] for name in linears}
        self.served.layer(index, layer, list(ordered))
        if self.replay is not None and not last:
            self.replay.finish(index, self.advance)
        if self.replay is not None:
            # a layer with nothing to round is sooner done
            passes = (self.rounding.needs != "nothing") + self.rounding.observes + (not last)
            self.advance(self.replay.all_tokens * passes - self._told)
        stored = self.shelf.put_away(layer, self._parts(ordered).tensors())
        self.encoded |= {name: _stored(stored, name) for name in ordered}

    def _calibrated(
        self, index: int, layer: nn.Module, linears: dict[str, nn.Linear], rounded: dict[str, Encoded], last: bool
    ) -> None:  # fmt: skip
        """Round the linears of a layer in the order in which they run, each on what the rounded ones before it give."""
        assert self.replay is not None
        steps = steps_of(self.replay, index, layer, linears)
        once = steps is not None
        steps = steps or [Step(list(linears))]
        for number, step in enumerate(steps):
            read = {name: linears[name] for name in (step.names[:1] if once else step.names)}
            needed = step.part is not None and not (last and number + 1 == len(steps)) and self._keeps(linears[step.names[0]])
            kept: list[Tensor] | None = [] if needed else None
            advance = _share(self.advance, number, len(steps))
            for shared in shared_inputs(self.replay, index, read, self.rounding.needs == "hessian", advance, kept, once):
                for names in self._alike(step.names if once else shared.names):
                    self._stack(names, linears, shared, rounded)
            self._fold({name: rounded[name] for name in step.names})
            if kept and step.part is not None:
                self.replay.shorten(step.part, kept)
            # the unrounded weights are not needed any more
            for name in step.names:
                linears[name] = _linear(self.model, name)
        if self.served.rounds:
            self.replay.forget()

    def _keeps(self, linear: nn.Linear) -> bool:
        """Whether all that a linear reads is kept, to spare what comes before it in later passes."""
        assert self.replay is not None
        return linear.in_features <= linear.out_features or 4 * linear.in_features * self.replay.positions <= KEPT_BYTES

    def end(self, name: str) -> None:
        """Round the embedding or the head, which are outside the layers and have no calibrated inputs."""
        module: Any = self.model.get_submodule(name)
        rounding = RoundingMethod(method="rtn" if self.rounding.method == "rtn" else "mse")
        self.errors.setdefault(kind_of(name), KindError())
        rounded: dict[str, Encoded] = {}
        self._stack([name], {name: module}, None, rounded, rounding)
        self._fold(rounded)
        self.encoded |= {name: encoded.to("cpu") for name, encoded in rounded.items()}

    def _alike(self, names: Sequence[str]) -> list[list[str]]:
        """Names with the same lattice, together, but where a scale belongs to one whole matrix."""
        groups: dict[Any, list[str]] = {}
        for name in names:
            spec = self.specs[name]
            alone = spec.group_size == "tensor" or spec.kind == "nvfp4"
            groups.setdefault((spec, name if alone else ""), []).append(name)
        return list(groups.values())

    def _parts(self, encoded: Mapping[str, Encoded]) -> QuantState:
        """Rounded modules, on the device where they are."""
        first = next((self.specs[name] for name in encoded), QuantSpec())
        return QuantState.of(first, self.specs, encoded, device=None)

    def _fold(self, encoded: Mapping[str, Encoded]) -> None:
        """Put rounded modules in the place of theirs."""
        fold(self.model, self._parts(encoded))

    def _stack(
        self, names: Sequence[str], linears: Mapping[str, Any], shared: SharedInput | None, rounded: dict[str, Encoded],
        rounding: RoundingMethod | None = None,
    ) -> None:  # fmt: skip
        """Round modules with the same input and lattice together."""
        spec = self.specs[names[0]]
        # only integer codes are searched for
        rounding = RoundingMethod() if spec.kind != "int" else rounding or self.rounding
        weights = [self._finite(name, linears[name].weight.detach()) for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        mask = None
        if not self.sparse.isdisjoint(names):
            mask = torch.cat([(own != 0).logical_or_(torch.tensor(name not in self.sparse)) for name, own in zip(names, weights)])
        stack = Stack(weight=weight, mask=mask, moments=None if shared is None else shared.moments)
        result = METHODS[rounding.method].round(stack, spec, rounding)
        if result.note:
            self.notes.append(f"{', '.join(names)}: {result.note}")
        plain = result if rounding.method == "rtn" else nearest(stack, spec)
        wholes = (weight, weight - result.values(spec), weight - plain.values(spec))
        begin = 0
        for name, own in zip(names, weights):
            rows = slice(begin, begin + len(own))
            begin += len(own)
            rounded[name] = result.rows(rows)
            kind = self.errors[kind_of(name)]
            kind.linears += 1
            kind.energy, kind.error, kind.nearest = (
                before + float(row_energy(whole[rows][sampled(len(own))], stack.moments).sum())
                for before, whole in zip((kind.energy, kind.error, kind.nearest), wholes)
            )

    def _finite(self, name: str, weight: Tensor) -> Tensor:
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{name}.weight cannot be quantized: it holds NaN or infinite numbers. Take an earlier checkpoint.")
        return weight


def _stored(tensors: Mapping[str, Tensor], module: str) -> Encoded:
    """What ``QuantState.tensors`` says of a module."""
    codes, scales = tensors[f"{module}.codes"], tensors[f"{module}.scale"]
    return Encoded(codes, scales, tensors.get(f"{module}.zero_point"), tensors.get(f"{module}.global_scale"))


def _share(advance: Advance, part: int, parts: int) -> Advance:
    """Told of work that is one of several parts, tells of its share; the parts of all add up to the whole."""
    return lambda done: advance(done * (part + 1) // parts - done * part // parts)


def take_values(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.to(dtype))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
