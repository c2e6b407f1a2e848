"""Linear layers that train on a lattice: putting them into a model, taking codes and scales out, folding them back.

    names = prepare(model, spec)          # every linear of the decoder layers rounds its weight in the forward
    ... train ...
    state = quantize_model(model, spec)   # codes and scales: what is exported
    fold(model, state)                    # plain linears again, weight = codes * scales: same logits, bit for bit

Parameters are shared, never copied: names in the state dict, optimizers and ties to parameters stay as they are.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.errors import UserError
from ..models.families import decoder_linears
from .fake_quant import quantize
from .linear import CodesLinear, Extras
from .linear import QuantLinear as QuantLinear
from .spec import QuantSpec
from .state import QuantState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(model: "PreTrainedModel", spec: QuantSpec, skip: Sequence[str] = (), extras: Extras | None = None) -> list[str]:
    """Replace the linears of the decoder layers by ``QuantLinear``, in place; embeddings and the head stay as they are.

    Args:
        model: Any causal language model with ``nn.Linear`` layers, on any device (also meta).
        spec: The lattice of every replaced weight.
        skip: fnmatch patterns of full module names left in full precision, such as ``*.down_proj``.
        extras: Parameters of the layers beside weight and bias; zeros until somebody gives them values. With adapters nothing but the
            extras trains.

    Returns:
        Names of the replaced modules, in module order.

    Raises:
        UserError: a pattern matches nothing, the group size does not divide, or a layer cannot be quantized; the model is untouched.
    """
    if _prepared(model):
        raise UserError("the model's linears are quantized already; prepare takes a plain model. Fold it first.")
    linears = target_linears(model, spec, skip)
    if extras is not None and extras.rank:
        model.requires_grad_(False)
    for name, linear in linears.items():
        model.set_submodule(name, QuantLinear(linear, spec, extras))
    return list(linears)


def hold_codes(model: "PreTrainedModel", state: QuantState) -> None:
    """Replace the modules of ``state`` by ``CodesLinear``, in place: their weights are dropped, their scales train, nothing else does.

    Args:
        model: A plain model that ``state`` was made from.
        state: Its codes and scales.
    """
    model.requires_grad_(False)
    for name in state.modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        device = linear.weight.device
        held = CodesLinear(state.codes[name].to(device), state.scales[name].to(device), linear.bias, state.spec_of(name))
        model.set_submodule(name, held.train(linear.training))


@torch.no_grad()
def quantize_model(model: "PreTrainedModel", spec: QuantSpec, skip: Sequence[str] = ()) -> QuantState:
    """Codes and scales of the model's (latent) weights; the model stays as it is.

    Args:
        model: A prepared model, whose ``QuantLinear`` layers and masks are taken, or a plain one (round to nearest).
        spec: The lattice; of a prepared model the one it was prepared with.
        skip: As in ``prepare``; of a prepared model the patterns it was prepared with, or empty.

    Raises:
        UserError: as in ``prepare``, a spec or skip other than the model was prepared with, or NaN or infinite weights.
    """
    prepared = _prepared(model)
    modules: Mapping[str, nn.Module] = prepared or target_linears(model, spec, skip)
    if any(module.spec != spec for module in prepared.values()):
        raise UserError(f"the model was prepared with another lattice than {spec}; quantize it with the one it was trained with.")
    if prepared and skip and set(_unskipped(model, skip)) != set(prepared):
        raise UserError(f"the model was prepared with other modules than skip={list(skip)} leaves; use the same patterns, or none.")
    codes, scales = {}, {}
    for name, module in modules.items():
        try:
            code, scale = _codes(module, spec)
        except ValueError as error:
            raise UserError(
                f"{name}.weight cannot be quantized: {error}. Take an earlier checkpoint or lower the learning rate."
            ) from error
        codes[name], scales[name] = code.cpu(), scale.cpu()
    return QuantState(spec=spec, modules=tuple(modules), codes=codes, scales=scales)


def _codes(module: nn.Module, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    if isinstance(module, QuantLinear | CodesLinear):
        return module.codes()
    assert isinstance(module, nn.Linear)
    return quantize(module.weight, spec)


@torch.no_grad()
def fold(model: "PreTrainedModel", state: QuantState) -> None:
    """Put plain ``nn.Linear`` with weight = codes * scales (fp32) in the place of every module of ``state``.

    In fp32 the folded model gives exactly the logits of the prepared one. Parameter names stay; the weights are new parameters.

    Raises:
        UserError: a module is missing, of another shape, not fp32, or prepared but not in ``state``; the model is untouched.
    """
    linears = _linears(model)
    left = [name for name in _prepared(model) if name not in state.codes]
    if left:
        raise UserError(f"module {left[0]} ({len(left)} in all) is prepared, but the codes do not cover it; quantize the whole model.")
    for name in state.modules:
        linear = linears.get(name)
        if linear is None or (linear.out_features, linear.in_features) != state.codes[name].shape:
            found = "missing" if linear is None else f"of shape {(linear.out_features, linear.in_features)}"
            raise UserError(
                f"module {name} is {found}, but the codes have shape {tuple(state.codes[name].shape)}; they are another model's."
            )
        if isinstance(linear, nn.Linear) and linear.weight.dtype != torch.float32:
            raise UserError(
                f"{name}.weight is {linear.weight.dtype}; codes * scales are exact in fp32 only: load the model with dtype=float32."
            )
    for name in state.modules:
        model.set_submodule(name, _plain(linears[name], state.dequantized(name)))


def _plain(linear: nn.Linear | CodesLinear, weight: Tensor) -> nn.Linear:
    """A plain linear with this weight and everything else of ``linear``."""
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    device = linear.weight.device if isinstance(linear, nn.Linear) else linear.code.device
    plain.weight = nn.Parameter(weight.to(device), requires_grad=not isinstance(linear, nn.Linear) or linear.weight.requires_grad)
    plain.register_parameter("bias", linear.bias)
    return plain.train(linear.training)


def _linears(model: "PreTrainedModel") -> dict[str, nn.Linear | CodesLinear]:
    """The decoder's linears, those that hold codes among them."""
    held = {name: module for name, module in model.named_modules() if isinstance(module, CodesLinear)}
    return {**decoder_linears(model), **held}


def _prepared(model: nn.Module) -> dict[str, QuantLinear | CodesLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear | CodesLinear)}


def _unskipped(model: "PreTrainedModel", skip: Sequence[str]) -> dict[str, nn.Linear | CodesLinear]:
    """Decoder linears that no pattern matches; a pattern that matches no linear and no embedding at all is an error."""
    linears = _linears(model)
    leaves = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | CodesLinear)]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in leaves):
            example = next(iter(linears), "model.layers.0.mlp.down_proj")
            raise UserError(
                f"skip: {pattern!r} matches no linear layer of the model; patterns are matched to full names such as "
                f"{example!r}, so write '*.{example.rsplit('.', 1)[-1]}' for all of a kind."
            )
    return {name: module for name, module in linears.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}


def target_linears(model: "PreTrainedModel", spec: QuantSpec, skip: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears to quantize, after checking that each can be."""
    try:
        spec.check_storable()
    except ValueError as error:
        raise UserError(f"weights: {error}") from None
    chosen = _unskipped(model, skip)
    if not chosen:
        raise UserError("there is nothing to quantize: " + (f"skip={list(skip)} leaves no linear layer." if skip else _NO_LINEARS))
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        for shared in (name, first):
            if first != name and shared.removesuffix(".weight") in chosen:
                raise UserError(
                    f"{shared} is shared between {first} and {name}; shared weights cannot be quantized. Add the module to skip."
                )
    linears: dict[str, nn.Linear] = {}
    for name, linear in chosen.items():
        if not isinstance(linear, nn.Linear) or type(linear) is not nn.Linear:
            raise UserError(
                f"module {name} is a {type(linear).__name__}, not a plain nn.Linear; load the model unquantized, or add it to skip."
            )
        try:
            spec.group_width(linear.in_features)
        except ValueError as error:
            raise UserError(f"module {name}: {error} (skip: ['{name}']).") from error
        linears[name] = linear
    return linears


_NO_LINEARS = "the model's decoder layers hold no nn.Linear; use a model of a family such as Llama, Mistral or Qwen."
