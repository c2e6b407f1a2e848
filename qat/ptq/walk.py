"""Rounding a whole model, decoder layer by decoder layer; what a rounded layer gives is what the next one is calibrated on.

Sources: Frantar et al., arXiv 2210.17323, section 3 (blocks in order, each on the outputs of the quantized ones before).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.errors import UserError
from ...models.families import decoder_layers
from ...models.weight_files import WeightFiles
from ..modules import fold, target_linears
from ..spec import QuantSpec
from ..state import QuantState
from .inputs import SharedInput, shared_inputs
from .methods import METHODS, Rounding, Stack, nearest
from .replay import Replay
from .report import KindError, kind_of, row_energy
from .shelf import FileShelf, MemoryShelf, Shelf
from .text import CalibrationText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Advance = Callable[[int], None]


@dataclass
class RoundedModel:
    """What ``round_model`` found; the model itself holds codes * scales."""

    state: QuantState
    errors: dict[str, KindError] = field(default_factory=dict)
    """By kind of linear, in module order."""
    notes: list[str] = field(default_factory=list)
    """What did not go as asked, a sentence each."""


@torch.no_grad()
def round_model(
    model: "PreTrainedModel",
    spec: QuantSpec,
    rounding: Rounding,
    *,
    skip: Sequence[str] = (),
    sparse: Collection[str] = (),
    text: CalibrationText | None = None,
    files: WeightFiles | None = None,
    work: Path | None = None,
    device: torch.device | str = "cpu",
    others: torch.dtype | None = None,
    advance: Advance = lambda done: None,
) -> RoundedModel:
    """Round the linears of the decoder layers, in place: plain linears with weight = codes * scales (fp32).

    Args:
        model: Plain, fp32, on the CPU; or on the meta device, from ``empty_model``, together with ``files`` and ``work``.
        spec: The lattice.
        rounding: The method.
        skip: fnmatch patterns of full module names left as they are; one that matches nothing is an error.
        sparse: Modules whose exact zeros are a pruning mask.
        text: What to calibrate on, where ``rounding.needs`` it.
        files: Where the weights of a model on the meta device are.
        work: An existing folder that then takes the rounded layers, 5 bytes a weight; the model and the codes are views of its files.
        device: Where the work is done, one layer at a time. The model ends on the CPU.
        others: Dtype that parameters which are not rounded will be stored in: they get its values (as fp32) before the model is run.
        advance: Told of work that is done, in the units of ``amount_of_work``.

    Raises:
        UserError: as in ``qat.modules.prepare``, weights that are NaN or infinite, text that is missing or empty, or a linear whose
            inputs cannot be calibrated.
        NonFiniteError: inputs of a linear are NaN or infinite.
    """
    layers = decoder_layers(model)
    names = _names(target_linears(model, spec, skip), layers or [model])
    calibrates = rounding.needs != "nothing"
    if calibrates:
        _check_calibration(text, layers, rounding)
    device = torch.device(device)
    if files is None:
        shelf: Shelf = MemoryShelf(model, layers, device)
    else:
        assert work is not None, "a model that is read from files needs a folder for its rounded layers"
        shelf = FileShelf(model, layers, files, work, device)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    if others is not None and layers:
        _take_values([parameter for parameter in model.parameters() if id(parameter) not in inside], others)
    replay = Replay(model, layers, text.batches, device) if calibrates and text is not None else None
    training = model.training
    model.eval()
    walk = _Walk(model, spec, rounding, frozenset(sparse), shelf, replay, others, advance)
    for index, layer in enumerate(layers or [model]):
        walk.layer(index, layer, names[index], index + 1 == len(layers))
    shelf.close()
    model.train(training)
    state = QuantState(spec=spec, modules=tuple(walk.codes), codes=walk.codes, scales=walk.scales)
    return RoundedModel(state=state, errors=walk.errors, notes=walk.notes)


def amount_of_work(model: "PreTrainedModel", spec: QuantSpec, rounding: Rounding, skip: Sequence[str], text: CalibrationText | None) -> int:
    """What ``advance`` will be told in all: tokens through layers where there is calibration, else weights."""
    if rounding.needs == "nothing" or text is None:
        return sum(linear.weight.numel() for linear in target_linears(model, spec, skip).values())
    return text.tokens * max(0, 2 * len(decoder_layers(model)) - 1)


def _names(linears: Mapping[str, nn.Linear], layers: Sequence[nn.Module]) -> list[list[str]]:
    """The names of each layer's linears. The modules themselves are let go of: each has its unrounded weight as long as it lives."""
    inside = [{id(module) for module in layer.modules()} for layer in layers]
    return [[name for name, linear in linears.items() if id(linear) in modules] for modules in inside]


def _check_calibration(text: CalibrationText | None, layers: Sequence[nn.Module], rounding: Rounding) -> None:
    if text is None or not text.tokens:
        raise UserError(f"method {rounding.method} has no token to calibrate on; raise calibration_tokens or give more text")
    if not layers:
        raise UserError(f"method {rounding.method} works layer by layer, but the model's decoder layers are not found; use method rtn")


class _Walk:
    """What is gathered on the way."""

    def __init__(
        self, model: "PreTrainedModel", spec: QuantSpec, rounding: Rounding, sparse: frozenset[str], shelf: Shelf, replay: Replay | None,
        others: torch.dtype | None, advance: Advance,
    ) -> None:  # fmt: skip
        self.model, self.spec, self.rounding, self.sparse, self.shelf = model, spec, rounding, sparse, shelf
        self.replay, self.others, self.advance = replay, others, advance
        self.codes: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.errors: dict[str, KindError] = {}
        self.notes: list[str] = []

    def layer(self, index: int, layer: nn.Module, names: Sequence[str], last: bool) -> None:
        """Round one layer, and run it for the next."""
        self.shelf.bring(layer)
        linears = {name: _linear(self.model, name) for name in names}
        if self.others is not None:
            rounded_later = {id(linear.weight) for linear in linears.values()}
            _take_values([parameter for parameter in layer.parameters() if id(parameter) not in rounded_later], self.others)
        for name in linears:
            self.errors.setdefault(kind_of(name), KindError())
        rounded: dict[str, tuple[Tensor, Tensor]] = {}
        if self.replay is None:
            for name in linears:
                self._stack([name], linears, None, rounded)
                self.advance(linears[name].weight.numel())
        elif linears:
            whole = self.rounding.needs == "hessian"
            for shared in shared_inputs(self.replay, index, linears, whole, self.advance):
                self._stack(shared.names, linears, shared, rounded)
        ordered = {name: rounded[name] for name in linears}
        parts = QuantState(
            spec=self.spec,
            modules=tuple(ordered),
            codes={name: codes for name, (codes, _) in ordered.items()},
            scales={name: scales for name, (_, scales) in ordered.items()},
        )
        fold(self.model, parts)
        if self.replay is not None and not last:
            self.replay.finish(index, self.advance)
        stored = self.shelf.put_away(layer, parts.tensors())
        self.codes |= {name: stored[f"{name}.codes"] for name in ordered}
        self.scales |= {name: stored[f"{name}.scale"] for name in ordered}

    def _stack(self, names: Sequence[str], linears: Mapping[str, nn.Linear], shared: SharedInput | None, rounded: dict[str, Any]) -> None:
        """Round linears with the same input together."""
        weights = [self._finite(name, linears[name].weight.detach()) for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        masks = [own != 0 if name in self.sparse else torch.ones_like(own, dtype=torch.bool) for name, own in zip(names, weights)]
        mask = torch.cat(masks) if not self.sparse.isdisjoint(names) else None
        stack = Stack(weight=weight, mask=mask, moments=None if shared is None else shared.moments)
        result = METHODS[self.rounding.method].round(stack, self.spec, self.rounding)
        if result.note:
            self.notes.append(f"{', '.join(names)}: {result.note}")
        plain = result if self.rounding.method == "rtn" else nearest(stack, self.spec)
        energies = [
            row_energy(rows, stack.moments) for rows in (weight, weight - result.values(self.spec), weight - plain.values(self.spec))
        ]
        begin = 0
        for name, own in zip(names, weights):
            rows = slice(begin, begin + len(own))
            begin += len(own)
            rounded[name] = (result.codes[rows], result.scales[rows])
            kind = self.errors[kind_of(name)]
            kind.linears += 1
            kind.energy, kind.error, kind.nearest = (
                before + float(energy[rows].sum()) for before, energy in zip((kind.energy, kind.error, kind.nearest), energies)
            )

    def _finite(self, name: str, weight: Tensor) -> Tensor:
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{name}.weight cannot be quantized: it holds NaN or infinite numbers. Take an earlier checkpoint.")
        return weight


def _take_values(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.to(dtype))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
