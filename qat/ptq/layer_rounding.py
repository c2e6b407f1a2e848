"""Rounds the modules of one decoder layer after the other, and embedding and head before them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.calibration.error_report import KindError, linear_kind
from ...models.calibration.hessians import SharedInput
from ...models.calibration.layer_storage import Shelf
from ...models.calibration.replay import Replay
from ...models.calibration.running_order import calibrated_inputs
from ...models.common.errors import UserError
from ...models.fused_linears import joined
from ..codes.state import QuantState, stored_sub_scales
from ..fake_quant import Encoded
from ..layers.quantized_model import fold
from ..spec import QuantSpec
from ..transforms.layer_case import LayerTransform
from .methods import METHODS, RoundingMethod, Stack, round_to_nearest
from .served_layers import ServedLayers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Advance = Callable[[int], None]


class Walk:
    """State of rounding a model: the settings, and the codes, errors and notes of the layers so far."""

    def __init__(
        self, model: "PreTrainedModel", specs: Mapping[str, QuantSpec], rounding: RoundingMethod, sparse: frozenset[str], shelf: Shelf,
        replay: Replay | None, others: torch.dtype | None, advance: Advance, importance: Mapping[str, Tensor],
        transform: LayerTransform | None = None,
    ) -> None:  # fmt: skip
        self.importance = importance
        self.model, self.specs, self.rounding, self.sparse, self.shelf = model, specs, rounding, sparse, shelf
        self.replay, self.others, self._report = replay, others, advance
        self._transform, self._reported = transform, 0
        self.served = ServedLayers(model, rounding, replay, self.advance)
        self.encoded: dict[str, Encoded] = {}
        self.errors: dict[str, KindError] = {}
        self.notes: list[str] = []

    def advance(self, done: int) -> None:
        """Reports work that is done."""
        self._reported += done
        self._report(done)

    def layer(self, index: int, layer: nn.Module, names: Sequence[str], last: bool) -> None:
        """Rounds one layer, and runs it to get the inputs of the next."""
        self._reported = 0
        self.shelf.bring(layer)
        # 1. the layer is on the device, in fp32; what follows sees the transformed layer, whose function is the same
        if self._transform is not None:
            self._transform.layer(index, layer, self.replay, self.advance)
        linears = {name: _linear(self.model, name) for name in names}
        if self.others is not None:
            # the following layers must see these parameters as they will be stored
            rounded_later = {id(linear.weight) for linear in linears.values()}
            take_values([parameter for parameter in layer.parameters() if id(parameter) not in rounded_later], self.others)
        for name in linears:
            self.errors.setdefault(linear_kind(name), KindError())
        rounded: dict[str, Encoded] = {}
        if self.replay is None or self.rounding.needs == "nothing":
            for group in self._one_by_one(linears):
                self._stack(group, linears, None, rounded)
                self.advance(sum(linears[name].weight.numel() for name in group) if self.replay is None else 0)
            self._fold(rounded)
        elif linears:
            self._calibrated(index, layer, linears, rounded, last)
        # in module order: the steps went by the order in which linears run
        ordered = {name: rounded[name] for name in linears}
        # 2. its outputs become those of serving, and the inputs of the next layer
        self.served.layer(index, layer, list(ordered))
        if self.replay is not None and not last:
            self.replay.finish(index, self.advance)
        if self.replay is not None:
            # a layer with nothing to round makes fewer passes: report the rest, so that the total is ``amount_of_work``
            passes = self.rounding.transforms_on_text + (self.rounding.needs != "nothing") + self.rounding.observes + (not last)
            self.advance(self.replay.all_tokens * passes - self._reported)
        # 3. out of the device's memory; codes go to the storage with the weights
        stored = self.shelf.put_away(layer, self._parts(ordered).tensors())
        self.encoded |= {name: _stored(stored, name) for name in ordered}

    def _calibrated(
        self, index: int, layer: nn.Module, linears: dict[str, nn.Linear], rounded: dict[str, Encoded], last: bool
    ) -> None:  # fmt: skip
        """Rounds the linears of a layer in the order in which they run, each on the outputs of the rounded ones before it."""
        assert self.replay is not None
        whole = self.rounding.needs == "hessian"
        for shared in calibrated_inputs(self.replay, index, layer, linears, whole=whole, last=last, advance=self.advance):
            for names in self._alike(shared.names):
                self._stack(names, linears, shared, rounded)
            self._fold({name: rounded[name] for name in shared.names})
            # the old modules own the unrounded weights: dropping them frees the memory
            for name in shared.names:
                linears[name] = _linear(self.model, name)
        # the passes that follow run with hooks on inputs, keys and values, which a shortened part would leave out
        if self.served.rounds:
            self.replay.forget()

    def embedding_or_head(self, name: str) -> None:
        """Rounds the embedding or the head, which are outside the layers and have no calibrated inputs."""
        module: Any = self.model.get_submodule(name)
        # without known inputs there is no Hessian: the search on the weights alone is next best
        rounding = RoundingMethod(method="rtn" if self.rounding.method == "rtn" else "mse")
        self.errors.setdefault(linear_kind(name), KindError())
        rounded: dict[str, Encoded] = {}
        self._stack([name], {name: module}, None, rounded, rounding)
        self._fold(rounded)
        self.encoded |= {name: encoded.to("cpu") for name, encoded in rounded.items()}

    def _alike(self, names: Sequence[str]) -> list[list[str]]:
        """Groups of names with the same spec. A module whose spec has one scale per matrix is a group of its own."""
        groups: dict[Any, list[str]] = {}
        for group in joined(names):
            for name in group:
                spec = self.specs[name]
                # stacked matrices get one scale together: right only for the global scale of parts that servers join
                alone = name if spec.group_size == "tensor" else group if spec.kind == "nvfp4" else ""
                groups.setdefault((spec, alone), []).append(name)
        return list(groups.values())

    def _one_by_one(self, names: Iterable[str]) -> list[list[str]]:
        """Each name alone, but together where parts of one matrix share a global scale."""
        nvfp4 = [name for name in names if self.specs[name].kind == "nvfp4"]
        return [[name] for name in names if name not in nvfp4] + self._alike(nvfp4)

    def _parts(self, encoded: Mapping[str, Encoded]) -> QuantState:
        """The quantization state of rounded modules, on their device."""
        first = next((self.specs[name] for name in encoded), QuantSpec())
        return QuantState.of(first, self.specs, encoded, device=None)

    def _fold(self, encoded: Mapping[str, Encoded]) -> None:
        """Replaces modules of the model by their rounded forms."""
        fold(self.model, self._parts(encoded))

    def _stack(
        self, names: Sequence[str], linears: Mapping[str, Any], shared: SharedInput | None, rounded: dict[str, Encoded],
        rounding: RoundingMethod | None = None,
    ) -> None:  # fmt: skip
        """Rounds modules with the same input and spec as one stacked weight; adds their codes to ``rounded``, their errors to the sums."""
        spec = self.specs[names[0]]
        rounding = rounding or self.rounding
        weights = [self._finite(name, linears[name].weight.detach()) for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        mask = None
        if not self.sparse.isdisjoint(names):
            # only where zeros are a mask: elsewhere a zero weight may round to another code
            mask = torch.cat([(own != 0).logical_or_(torch.tensor(name not in self.sparse)) for name, own in zip(names, weights)])
        moments = None if shared is None else shared.moments
        # given mean squares take the place of measured ones; modules that are rounded together have the same input
        if moments is None and names[0] in self.importance:
            moments, rounding = self.importance[names[0]].to(weight.device), replace(rounding, weighted=True)
        stack = Stack(weight=weight, mask=mask, moments=moments)
        result = METHODS[rounding.method].round(stack, spec, rounding)
        if result.note:
            self.notes.append(f"{', '.join(names)}: {result.note}")
        # the yardstick of the report: the error that rounding to nearest would have had
        plain = result if rounding.method == "rtn" else round_to_nearest(stack, spec)
        values, nearest = result.values(spec), plain.values(spec)
        begin = 0
        for name, own in zip(names, weights):
            rows = slice(begin, begin + len(own))
            begin += len(own)
            rounded[name] = result.rows(rows)
            self.errors[linear_kind(name)].add(weight[rows], values[rows], nearest[rows], stack.moments)

    def _finite(self, name: str, weight: Tensor) -> Tensor:
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{name}.weight cannot be quantized: it holds NaN or infinite numbers. Take an earlier checkpoint.")
        return weight


def _stored(tensors: Mapping[str, Tensor], module: str) -> Encoded:
    """Codes and scales of a module from the tensors of ``QuantState.tensors``."""
    codes, scales = tensors[f"{module}.codes"], tensors[f"{module}.scale"]
    zeros, whole = tensors.get(f"{module}.zero_point"), tensors.get(f"{module}.global_scale")
    return Encoded(codes, scales, zeros, whole, stored_sub_scales(tensors, module))


def take_values(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    """Rounds parameters to the values that ``dtype`` can hold; they keep their own dtype."""
    for parameter in parameters:
        parameter.copy_(parameter.to(dtype))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
