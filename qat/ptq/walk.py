"""Rounds a whole model, decoder layer by decoder layer; each is calibrated on the outputs of the rounded linears and layers before it.

If inputs, keys or values are quantized too, these outputs are those of serving (``served_layers.py``).

Source: Frantar et al., arXiv 2210.17323, section 3 (blocks in order, each on the outputs of the quantized blocks before it).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.calibration.calibration_text import CalibrationText
from ...models.calibration.error_report import KindError
from ...models.calibration.layer_storage import FileShelf, MemoryShelf, Shelf
from ...models.calibration.replay import Remedies, Replay
from ...models.common.errors import UserError
from ...models.families import decoder_layers, decoder_linears
from ...models.folder.weights import WeightFiles
from ..codes.state import QuantState
from ..layers.targets import Target, check_zeros_held, targets
from ..scheme import QuantScheme
from ..spec import QuantSpec
from ..transforms.table import open_transform
from .layer_rounding import Advance, Walk, take_values
from .methods import RoundingMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel


REMEDIES = Remedies(
    linear="add it to skip, or use method rtn, or mse without weighted",
    layer="use method rtn or mse, which need no run",
    overflow="Take an earlier checkpoint, or more bits",
)


@dataclass
class RoundedModel:
    """Result of ``round_model``. The model itself holds codes * scales, and hooks if inputs, keys or values are quantized."""

    state: QuantState
    errors: dict[str, KindError] = field(default_factory=dict)
    """Rounding errors by kind of linear, in module order."""
    outliers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(columns with an outlier on the calibration text, columns) of each module's input, if outliers stay unrounded."""
    notes: list[str] = field(default_factory=list)
    """What differs from the settings, one sentence each."""
    transform: dict[str, Any] = field(default_factory=dict)
    """What the transform did (``LayerTransform.record``); {} without one."""


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
    importance: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    advance: Advance = lambda done: None,
) -> RoundedModel:
    """Rounds the linears of the decoder layers in place: they become plain linears with weight = codes * scales (fp32).

    Embedding and head, if the scheme quantizes them, are rounded first: by rtn if that is the method, else by mse.

    Args:
        model: Plain, fp32, on the CPU; or on the meta device, from ``empty_model``, together with ``files`` and ``work``.
        spec: The quantization spec of all linears, or a scheme.
        rounding: The method, and how inputs, keys and values are quantized. Hessians are taken of inputs before their quantization.
        skip: With a spec: fnmatch patterns of full module names that stay unquantized; a pattern without a match is an error.
        sparse: Modules whose exact zeros are a pruning mask.
        text: Calibration text, needed if ``rounding.calibrates``.
        files: The weights of a model on the meta device.
        work: With ``files``: an existing folder for the rounded layers, 5 bytes per weight; model and codes are views of its files.
        device: Device of the work, one layer at a time. At the end the model is on the CPU.
        others: Dtype in which unquantized parameters will be stored: they are rounded to its values (and stay fp32) before the model runs.
        importance: Method mse: the mean square of each input, fp32 [in], by module name; it weights the errors without a text.
        seed: Seed of a random transform.
        advance: Called with the work that is done, in the units of ``amount_of_work``.

    Raises:
        UserError: as in ``qat.layers.quantized_model.prepare``; a module of ``sparse`` has a kind that does not hold 0; weights are NaN or
            infinite; text is missing or empty; the inputs of a linear cannot be calibrated; as in
            ``qat.transforms.table.open_transform``; as in ``qat.layers.kv_cache_hooks.round_cache``.
        NonFiniteError: inputs of a linear are NaN or infinite.
    """
    # 1. what is rounded, and checks, before anything is changed
    layers = decoder_layers(model)
    scheme = QuantScheme.of(spec, skip)
    chosen = targets(model, scheme)
    specs = {name: target.spec for name, target in chosen.items()}
    check_zeros_held(specs, sparse)
    names, outer = _names(chosen, layers or [model], model)
    # it refers to the modules, and so to the unrounded weights, which are freed layer by layer
    del chosen
    if rounding.calibrates:
        _check_calibration(text, layers, rounding)
    transform = open_transform(model, rounding.transform, specs, sparse=sparse, seed=seed) if rounding.transform else None
    device = torch.device(device)
    # 2. where the weights are while other layers are worked on
    if files is None:
        shelf: Shelf = MemoryShelf(model, layers, device)
    else:
        assert work is not None, "a model that is read from files needs a folder for its rounded layers"
        shelf = FileShelf(model, layers, files, work, device)
    if transform is not None:
        transform.outside()
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    if others is not None and layers:
        # layers follow one by one in ``Walk.layer``, embedding and head when they are rounded
        later = inside | {id(model.get_submodule(name).weight) for name in outer}
        take_values([parameter for parameter in model.parameters() if id(parameter) not in later], others)
    # 3. the walk; eval mode, because dropout would make calibration random
    replay = Replay(model, layers, text.batches, device, REMEDIES) if rounding.calibrates and text is not None else None
    training = model.training
    model.eval()
    walk = Walk(model, specs, rounding, frozenset(sparse), shelf, replay, others, advance, importance or {}, transform)
    try:
        # first, because the first layer must see the rounded embedding
        for name in outer:
            walk.embedding_or_head(name)
        # without a list of layers the whole model is one
        for index, layer in enumerate(layers or [model]):
            walk.layer(index, layer, names[index], index + 1 == len(layers))
        shelf.close()
    finally:
        model.train(training)
    # in the order of ``specs``: embedding and head were rounded first, but stand at their places
    state = QuantState.of(scheme.weights, specs, {name: walk.encoded[name] for name in specs})
    outliers = walk.served.outliers()
    if outliers and all(some == columns for some, columns in outliers.values()):
        assert rounding.activations is not None
        raise UserError(
            f"activations.outliers={rounding.activations.outliers:g} rounds nothing: on the calibration text every input column has values "
            "of that magnitude; use a larger threshold (6 is usual)"
        )
    return RoundedModel(
        state=replace(state, **walk.served.state()),
        errors=walk.errors,
        outliers=outliers,
        notes=walk.notes,
        transform=transform.record() if transform else {},
    )


def amount_of_work(
    model: "PreTrainedModel", spec: QuantSpec | QuantScheme, rounding: RoundingMethod, skip: Sequence[str], text: CalibrationText | None
) -> int:
    """The total of all calls of ``advance``: tokens through layers if there is calibration, else weights of the decoder layers."""
    layers = len(decoder_layers(model))
    if text is None or not rounding.calibrates:
        linears = decoder_linears(model)
        return sum(linears[name].weight.numel() for name in targets(model, QuantScheme.of(spec, skip)) if name in linears)
    # per layer a pass for the transform, one for Hessians, one for ranges and one for the next layer's inputs, which the last does not need
    passes = rounding.transforms_on_text + (rounding.needs != "nothing") + rounding.observes
    return text.tokens * max(0, (passes + 1) * layers - 1)


def _names(chosen: Mapping[str, Target], layers: Sequence[nn.Module], model: "PreTrainedModel") -> tuple[list[list[str]], list[str]]:
    """The names of each layer's linears, and the names of embedding and head if they are chosen.

    Names and not modules, because a module keeps its unrounded weight alive.
    """
    # by identity: without a list of layers the whole model is the one layer, which has them inside
    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    outer = [name for name, target in chosen.items() if id(target.module) in outside]
    inside = [{id(module) for module in layer.modules()} - outside for layer in layers]
    return [[name for name, target in chosen.items() if id(target.module) in modules] for modules in inside], outer


def _check_calibration(text: CalibrationText | None, layers: Sequence[nn.Module], rounding: RoundingMethod) -> None:
    if text is None or not text.tokens:
        raise UserError(f"{_who(rounding)} calibration text, and there is none; raise calibration_tokens or give more text")
    if not layers:
        remedy = "use method rtn" + (" and scaling: dynamic" if rounding.observes else "")
        remedy += " without transform" if rounding.transforms_on_text else ""
        raise UserError(f"{_who(rounding)} the model's decoder layers, and they are not found; {remedy}")


def _who(rounding: RoundingMethod) -> str:
    if rounding.needs != "nothing":
        return f"method {rounding.method} needs"
    if rounding.transform is not None and rounding.transform.calibrates:
        return f"transform {rounding.transform.method} needs"
    static = any(spec is not None and spec.scaling == "static" for spec in (rounding.activations, rounding.kv_cache))
    return "static scales of activations or kv_cache need" if static else "counting the outliers of activations needs"
