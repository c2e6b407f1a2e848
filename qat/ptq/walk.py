"""Rounding a whole model, decoder layer by decoder layer; what rounded linears and layers give is what the next ones are calibrated on.

Where inputs, keys or values are rounded too, a layer gives what it will give when it is served (``served_layers.py``).

Sources: Frantar et al., arXiv 2210.17323, section 3 (blocks in order, each on the outputs of the quantized ones before).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...models.common.errors import UserError
from ...models.families import decoder_layers, decoder_linears
from ...models.folder.weights import WeightFiles
from ..codes.state import QuantState
from ..layers.targets import Target, targets
from ..scheme import QuantScheme
from ..spec import QuantSpec
from .calibration_text import CalibrationText
from .error_report import KindError
from .layer_rounding import Advance, Walk, take_values
from .layer_storage import FileShelf, MemoryShelf, Shelf
from .methods import RoundingMethod
from .replay import Replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class RoundedModel:
    """What ``round_model`` found; the model itself holds codes * scales, and hooks where more than weights is rounded."""

    state: QuantState
    errors: dict[str, KindError] = field(default_factory=dict)
    """By kind of linear, in module order."""
    notes: list[str] = field(default_factory=list)
    """What did not go as asked, a sentence each."""


@torch.no_grad()
def round_model(
    model: "PreTrainedModel",
    spec: QuantSpec | QuantScheme,
    rounding: RoundingMethod,
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

    Embedding and head, where lattices name them, are rounded first, by rtn or else by mse, whatever the method.

    Args:
        model: Plain, fp32, on the CPU; or on the meta device, from ``empty_model``, together with ``files`` and ``work``.
        spec: The lattice, or lattices.
        rounding: The method, and how inputs, keys and values are rounded. Hessians are those of inputs that are not rounded yet.
        skip: Beside a lattice: fnmatch patterns of full module names left as they are; one that matches nothing is an error.
        sparse: Modules whose exact zeros are a pruning mask.
        text: What to calibrate on, where ``rounding.needs`` it or ``rounding.observes``.
        files: Where the weights of a model on the meta device are.
        work: An existing folder that then takes the rounded layers, 5 bytes a weight; the model and the codes are views of its files.
        device: Where the work is done, one layer at a time. The model ends on the CPU.
        others: Dtype that parameters which are not rounded will be stored in: they get its values (as fp32) before the model is run.
        advance: Told of work that is done, in the units of ``amount_of_work``.

    Raises:
        UserError: as in ``qat.layers.quantized_model.prepare``; weights are NaN or infinite; text is missing or empty; the inputs of a
            linear cannot be calibrated; as in ``qat.layers.kv_cache_hooks.round_cache``.
        NonFiniteError: inputs of a linear are NaN or infinite.
    """
    layers = decoder_layers(model)
    scheme = QuantScheme.of(spec, skip)
    chosen = targets(model, scheme)
    specs = {name: target.spec for name, target in chosen.items()}
    names, ends = _names(chosen, layers or [model], model)
    del chosen
    calibrates = rounding.needs != "nothing" or rounding.observes
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
        later = inside | {id(model.get_submodule(name).weight) for name in ends}
        take_values([parameter for parameter in model.parameters() if id(parameter) not in later], others)
    replay = Replay(model, layers, text.batches, device) if calibrates and text is not None else None
    training = model.training
    model.eval()
    walk = Walk(model, specs, rounding, frozenset(sparse), shelf, replay, others, advance)
    try:
        for name in ends:
            walk.end(name)
        for index, layer in enumerate(layers or [model]):
            walk.layer(index, layer, names[index], index + 1 == len(layers))
        shelf.close()
    finally:
        model.train(training)
    state = QuantState.of(scheme.weights, specs, {name: walk.encoded[name] for name in specs})
    return RoundedModel(state=replace(state, **walk.served.state()), errors=walk.errors, notes=walk.notes)


def amount_of_work(
    model: "PreTrainedModel", spec: QuantSpec | QuantScheme, rounding: RoundingMethod, skip: Sequence[str], text: CalibrationText | None
) -> int:
    """What ``advance`` will be told in all: tokens through layers where there is calibration, else weights of the decoder layers."""
    calibrates, layers = rounding.needs != "nothing", len(decoder_layers(model))
    if text is None or not (calibrates or rounding.observes):
        linears = decoder_linears(model)
        return sum(linears[name].weight.numel() for name in targets(model, QuantScheme.of(spec, skip)) if name in linears)
    return text.tokens * max(0, (calibrates + rounding.observes + 1) * layers - 1)


def _names(chosen: Mapping[str, Target], layers: Sequence[nn.Module], model: "PreTrainedModel") -> tuple[list[list[str]], list[str]]:
    """The names of each layer's linears, and of embedding and head where they are chosen. The modules themselves are let go of: each has
    its unrounded weight as long as it lives."""
    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    ends = [name for name, target in chosen.items() if id(target.module) in outside]
    inside = [{id(module) for module in layer.modules()} - outside for layer in layers]
    return [[name for name, target in chosen.items() if id(target.module) in modules] for modules in inside], ends


def _check_calibration(text: CalibrationText | None, layers: Sequence[nn.Module], rounding: RoundingMethod) -> None:
    if text is None or not text.tokens:
        raise UserError(f"{_who(rounding)} no token to calibrate on; raise calibration_tokens or give more text")
    if not layers:
        remedy = "use method rtn" + (" and scaling: dynamic" if rounding.observes else "")
        raise UserError(f"{_who(rounding)} to look at layer after layer, but the model's decoder layers are not found; {remedy}")


def _who(rounding: RoundingMethod) -> str:
    return f"method {rounding.method} has" if rounding.needs != "nothing" else "static scales of activations or kv_cache have"
