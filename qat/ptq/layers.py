"""Rounding the modules of one decoder layer after the other, and embedding and head before them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.errors import UserError
from ..fake_quant import Encoded
from ..modules import fold
from ..spec import QuantSpec
from ..state import QuantState
from .inputs import SharedInput, shared_inputs
from .methods import METHODS, Rounding, Stack, nearest
from .replay import Replay
from .report import KindError, kind_of, row_energy
from .served import ServedLayers
from .shelf import Shelf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Advance = Callable[[int], None]


class Walk:
    """What is gathered on the way."""

    def __init__(
        self, model: "PreTrainedModel", specs: Mapping[str, QuantSpec], rounding: Rounding, sparse: frozenset[str], shelf: Shelf,
        replay: Replay | None, others: torch.dtype | None, advance: Advance,
    ) -> None:  # fmt: skip
        self.model, self.specs, self.rounding, self.sparse, self.shelf = model, specs, rounding, sparse, shelf
        self.replay, self.others, self.advance = replay, others, advance
        self.served = ServedLayers(model, rounding, replay, advance)
        self.encoded: dict[str, Encoded] = {}
        self.errors: dict[str, KindError] = {}
        self.notes: list[str] = []

    def layer(self, index: int, layer: nn.Module, names: Sequence[str], last: bool) -> None:
        """Round one layer, and run it for the next."""
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
        elif linears:
            whole = self.rounding.needs == "hessian"
            for shared in shared_inputs(self.replay, index, linears, whole, self.advance):
                for names_alike in self._alike(shared.names):
                    self._stack(names_alike, linears, shared, rounded)
        ordered = {name: rounded[name] for name in linears}
        parts = self._fold(ordered)
        self.served.layer(index, layer, parts.modules)
        if self.replay is not None and not last:
            self.replay.finish(index, self.advance)
        stored = self.shelf.put_away(layer, parts.tensors())
        self.encoded |= {name: _stored(stored, name) for name in ordered}

    def end(self, name: str) -> None:
        """Round the embedding or the head, which are outside the layers and have no calibrated inputs."""
        module: Any = self.model.get_submodule(name)
        rounding = Rounding(method="rtn" if self.rounding.method == "rtn" else "mse")
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

    def _fold(self, encoded: Mapping[str, Encoded]) -> QuantState:
        """Put rounded modules in the place of theirs, on the device where they are."""
        first = next((self.specs[name] for name in encoded), QuantSpec())
        parts = QuantState.of(first, self.specs, encoded, device=None)
        fold(self.model, parts)
        return parts

    def _stack(
        self, names: Sequence[str], linears: Mapping[str, Any], shared: SharedInput | None, rounded: dict[str, Encoded],
        rounding: Rounding | None = None,
    ) -> None:  # fmt: skip
        """Round modules with the same input and lattice together."""
        spec = self.specs[names[0]]
        # only integer codes are searched for
        rounding = Rounding() if spec.kind != "int" else rounding or self.rounding
        weights = [self._finite(name, linears[name].weight.detach()) for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        masks = [own != 0 if name in self.sparse else torch.ones_like(own, dtype=torch.bool) for name, own in zip(names, weights)]
        mask = torch.cat(masks) if not self.sparse.isdisjoint(names) else None
        stack = Stack(weight=weight, mask=mask, moments=None if shared is None else shared.moments)
        result = METHODS[rounding.method].round(stack, spec, rounding)
        if result.note:
            self.notes.append(f"{', '.join(names)}: {result.note}")
        plain = result if rounding.method == "rtn" else nearest(stack, spec)
        energies = [row_energy(rows, stack.moments) for rows in (weight, weight - result.values(spec), weight - plain.values(spec))]
        begin = 0
        for name, own in zip(names, weights):
            rows = slice(begin, begin + len(own))
            begin += len(own)
            rounded[name] = result.rows(rows)
            kind = self.errors[kind_of(name)]
            kind.linears += 1
            kind.energy, kind.error, kind.nearest = (
                before + float(energy[rows].sum()) for before, energy in zip((kind.energy, kind.error, kind.nearest), energies)
            )

    def _finite(self, name: str, weight: Tensor) -> Tensor:
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{name}.weight cannot be quantized: it holds NaN or infinite numbers. Take an earlier checkpoint.")
        return weight


def _stored(tensors: Mapping[str, Tensor], module: str) -> Encoded:
    """What ``QuantState.tensors`` says of a module."""
    codes, scales = tensors[f"{module}.codes"], tensors[f"{module}.scale"]
    return Encoded(codes, scales, tensors.get(f"{module}.zero_point"), tensors.get(f"{module}.global_scale"))


def take_values(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.to(dtype))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
