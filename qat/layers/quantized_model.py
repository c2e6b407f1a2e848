"""Puts quantized layers into a model, takes codes and scales out of it, and folds it back into plain layers.

    names = prepare(model, spec)          # every linear of the decoder layers rounds its weight in the forward pass
    ... train ...
    state = quantize_model(model, spec)   # codes and scales, as they are exported
    fold(model, state)                    # plain linears again, weight = codes * scales: same logits, bit for bit

Parameters are shared, never copied, so names in the state dict, optimizers and tied parameters stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.common.errors import UserError
from ...models.families import decoder_linears
from ...models.fused_linears import joined
from ...models.ties import is_tied
from ..codes.state import QuantState
from ..fake_quant import Encoded, encode
from ..fake_quant.floats import shared_global_scale
from ..scheme import QuantScheme
from ..spec import QuantSpec
from .codes_linear import CodesLinear
from .quant_linear import Extras, QuantEmbedding, RoundedWeight, TiedHead
from .quant_linear import QuantLinear as QuantLinear
from .targets import specs_of_ends, targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(model: "PreTrainedModel", spec: QuantSpec | QuantScheme, skip: Sequence[str] = (), extras: Extras | None = None) -> list[str]:
    """Replaces the linears of the decoder layers by ``QuantLinear``, in place, and embedding and head if the scheme quantizes them.

    Args:
        model: Any causal language model with ``nn.Linear`` layers, on any device (also meta).
        spec: The quantization spec of every replaced weight, or a scheme.
        skip: With a spec: fnmatch patterns of full module names that stay in full precision, such as ``*.down_proj``.
        extras: Further parameters of the layers. They are zero until the caller sets them. With adapters only the extras train; embedding
            and head get no adapter, so their weights stay.

    Returns:
        Names of the replaced modules, in module order, without a head that is tied to the embedding.

    Raises:
        UserError: a pattern matches nothing, the group size does not divide, or a layer cannot be quantized; the model is not changed.
    """
    if _prepared(model):
        raise UserError("the model's linears are quantized already; prepare takes a plain model. Fold it first.")
    chosen = targets(model, QuantScheme.of(spec, skip))
    for name, target in chosen.items():
        if isinstance(target.module, nn.Embedding) and type(target.module) is not nn.Embedding:
            raise UserError(
                f"embedding: {name} is a {type(target.module).__name__}, which does more than look rows up, so it cannot be trained "
                "quantized; leave 'embedding' out (with a mix: add it to skip), or quantize it without training (stage 'quantize')"
            )
        if extras is not None and extras.rank > min(target.module.weight.shape):
            rows, columns = target.module.weight.shape
            raise UserError(f"lora={extras.rank} is above the largest rank of {name}, {min(rows, columns)}; 16 or 32 are usual")
    # asked before the embedding is replaced, which ends the tie
    tied = is_tied(model)
    # norms, embeddings and biases are frozen as well; the extras, made below, are new parameters, which train
    if extras is not None and extras.rank:
        model.requires_grad_(False)
    for name, target in chosen.items():
        module, own = target.module, target.spec
        if isinstance(module, nn.Linear):
            head = module is model.get_output_embeddings()
            model.set_submodule(name, QuantLinear(module, own, replace(extras, rank=0) if head and extras else extras))
        else:
            _replace_embedding(model, name, QuantEmbedding(module, own, replace(extras, rank=0) if extras else None), tied)
    for names in _sharing({name: target.spec for name, target in chosen.items()}):
        modules: Any = tuple(model.get_submodule(name) for name in names)
        for module in modules:
            module.joined = modules
    return list(chosen)


def _sharing(specs: Mapping[str, QuantSpec]) -> list[tuple[str, ...]]:
    """The modules of kind nvfp4 that share a global scale, because servers join them into one matrix."""
    return [names for names in joined(name for name, spec in specs.items() if spec.kind == "nvfp4") if len(names) > 1]


def _replace_embedding(model: "PreTrainedModel", name: str, embedding: QuantEmbedding, tied: bool) -> None:
    """Replaces the embedding by a rounded one, and a head that is tied to it by a ``TiedHead``."""
    head: Any = model.get_output_embeddings()
    model.set_submodule(name, embedding)
    if tied:
        model.set_output_embeddings(TiedHead(head, embedding))


def hold_codes(model: "PreTrainedModel", state: QuantState) -> None:
    """Replaces the modules of ``state`` by ``CodesLinear``, in place: their weights are dropped, and only their scales train.

    Args:
        model: The plain model that ``state`` was made from.
        state: Codes and scales of linears, of kind int.
    """
    # the scales are new parameters, which train; everything else is frozen
    model.requires_grad_(False)
    for name in state.modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        # a state is on the CPU, the layer wherever its linear was
        encoded = state.encoded(name).to(linear.weight.device)
        model.set_submodule(name, CodesLinear(encoded, linear.bias, state.spec_of(name)).train(linear.training))


@torch.no_grad()
def quantize_model(model: "PreTrainedModel", spec: QuantSpec | QuantScheme, skip: Sequence[str] = ()) -> QuantState:
    """Encodes the model's (latent) weights into codes and scales; the model is not changed.

    Args:
        model: A prepared model, whose layers and masks are used, or a plain one (round to nearest).
        spec: The spec or scheme; for a prepared model the one it was prepared with.
        skip: As in ``prepare``; for a prepared model the patterns it was prepared with, or empty.

    Raises:
        UserError: as in ``prepare``; spec or skip differ from those the model was prepared with; or weights are NaN or infinite.
    """
    scheme = QuantScheme.of(spec, skip)
    prepared = _prepared(model)
    if prepared:
        # a bare spec without patterns says nothing about which modules are meant
        _check_prepared(model, prepared, scheme, asked=bool(skip) or isinstance(spec, QuantScheme))
    plain = {} if prepared else targets(model, scheme)
    specs = {name: one.spec for name, one in (prepared or plain).items()}
    encoded = {}
    # prepared modules know whom they share a global scale with
    sharing = {} if prepared else {name: names for names in _sharing(specs) for name in names}
    for name, spec_of in specs.items():
        whole = shared_global_scale([(plain[one].module.weight, None) for one in sharing[name]]) if name in sharing else None
        try:
            encoded[name] = _encoded(prepared[name] if prepared else plain[name].module, spec_of, whole)
        except ValueError as error:
            raise UserError(
                f"{name}.weight cannot be quantized: {error}. Take an earlier checkpoint or lower the learning rate."
            ) from error
    return QuantState.of(scheme.weights, specs, encoded)


def _encoded(module: nn.Module, spec: QuantSpec, whole: Tensor | None) -> Encoded:
    # a prepared layer knows its scales and its mask; a plain one is rounded to nearest
    if isinstance(module, RoundedWeight | CodesLinear):
        return module.encoded()
    assert isinstance(module, nn.Linear | nn.Embedding)
    return encode(module.weight, spec, whole=whole)


def _check_prepared(model: "PreTrainedModel", prepared: Mapping[str, "_Prepared"], scheme: QuantScheme, asked: bool) -> None:
    """Raises UserError if a prepared model has other specs than ``scheme``, or, if ``asked``, other modules."""
    # the decoder's linears, each as what it was replaced by
    inside = {name: prepared.get(name, module) for name, module in _linears(model).items()}
    try:
        shapes = {name: shape for name, module in inside.items() if (asked or name in prepared) and (shape := _shape(module))}
        wanted = scheme.of_linears(shapes)
    except ValueError as error:
        raise UserError(str(error)) from None
    ends: dict[str, Any] = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    outer = {ends[key]: own for key, own in specs_of_ends(model, scheme).items()}
    # embedding and head, which are outside the decoder layers
    held = {name: module for name, module in prepared.items() if name not in inside}
    if asked and (set(wanted) != set(prepared) - set(held) or set(held.values()) != set(outer)):
        raise UserError(f"the model was prepared with other modules than skip={list(scheme.skip)} leaves; use the same patterns, or none.")
    other = any(module.spec != own for module, own in outer.items())
    if (asked and other) or any(prepared[name].spec != spec for name, spec in wanted.items()):
        raise UserError(f"the model was prepared with another spec than {scheme.weights}; quantize it with the spec it was trained with.")


@torch.no_grad()
def fold(model: "PreTrainedModel", state: QuantState) -> None:
    """Replaces every module of ``state`` by a plain layer with weight = codes * scales (fp32).

    In fp32 the folded model gives exactly the logits of the prepared one. Parameter names stay; the weights are new parameters.

    Raises:
        UserError: a module is missing, has another shape, is not fp32, or is prepared but not in ``state``; the model is not changed.
    """
    # 1. checks
    # a layer that still rounds would change its weights again in each forward pass
    left = [name for name in _prepared(model) if name not in state.codes]
    if left:
        raise UserError(f"module {left[0]} ({len(left)} in all) is prepared, but the codes do not cover it; quantize the whole model.")
    held = dict(model.named_modules())
    tied = is_tied(model)
    for name in state.modules:
        module = held.get(name)
        shape = _shape(module)
        if module is None or shape != tuple(state.codes[name].shape):
            found = "missing" if module is None else f"of shape {shape}"
            raise UserError(
                f"module {name} is {found}, but the codes have shape {tuple(state.codes[name].shape)}; they are another model's."
            )
        if not isinstance(module, CodesLinear) and module.weight.dtype != torch.float32:
            raise UserError(
                f"{name}.weight is {module.weight.dtype}; codes * scales are exact in fp32 only: load the model with dtype=float32."
            )
    # only after all checks, so that an error leaves the model unchanged
    for name in state.modules:
        module = held[name]
        if isinstance(module, nn.Linear | CodesLinear):
            model.set_submodule(name, _plain(module, state.dequantized(name)))
        else:
            _fold_embedding(model, name, module, state.dequantized(name), tied)


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """[out, in] of a layer that can be folded; None for all other modules."""
    if isinstance(module, CodesLinear):
        return module.out_features, module.in_features
    if not isinstance(module, nn.Linear | nn.Embedding):
        return None
    rows, columns = module.weight.shape
    return rows, columns


def _fold_embedding(model: "PreTrainedModel", name: str, embedding: Any, table: Tensor, tied: bool) -> None:
    """A plain embedding with this table, and the head that is tied to it."""
    weight = nn.Parameter(table.to(embedding.weight.device), requires_grad=embedding.weight.requires_grad)
    if isinstance(embedding, QuantEmbedding):
        rows, columns = weight.shape
        plain = nn.Embedding(rows, columns, padding_idx=embedding.padding_idx, _weight=weight)
        # nn.Embedding makes a parameter of its own from _weight, and a tied head must share this one
        plain.weight = weight
        model.set_submodule(name, plain.train(embedding.training))
    else:
        # a plain embedding, rounded without training, keeps its module and gets the new table
        embedding.weight = weight
    if tied:
        head: Any = model.get_output_embeddings()
        if isinstance(head, TiedHead):
            model.set_output_embeddings(_plain(head, table))
            head = model.get_output_embeddings()
        # the very parameter of the embedding: a copy would end the tie
        head.weight = weight


def _plain(linear: nn.Linear | CodesLinear, weight: Tensor) -> nn.Linear:
    """A plain linear with this weight and everything else of ``linear``."""
    # on the meta device: nothing is allocated, no random number is drawn
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    device = linear.weight.device if isinstance(linear, nn.Linear) else linear.code.device
    # codes do not train; the weight that takes their place does, as in a plain model
    plain.weight = nn.Parameter(weight.to(device), requires_grad=not isinstance(linear, nn.Linear) or linear.weight.requires_grad)
    plain.register_parameter("bias", linear.bias)
    return plain.train(linear.training)


def _linears(model: "PreTrainedModel") -> dict[str, nn.Linear | CodesLinear]:
    """The decoder's linears, including those that hold codes."""
    held = {name: module for name, module in model.named_modules() if isinstance(module, CodesLinear)}
    return {**decoder_linears(model), **held}


_Prepared = QuantLinear | QuantEmbedding | CodesLinear


def _prepared(model: nn.Module) -> dict[str, _Prepared]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _Prepared)}
