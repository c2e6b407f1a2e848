"""Finds the modules that a scheme quantizes and checks them before anything is changed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from ...models.common.errors import UserError
from ...models.families import decoder_linears, is_plain_linear
from ...models.ties import is_tied
from ..scheme import QuantScheme, example_of
from ..spec import QuantSpec
from ..super_blocks import no_zero

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Target:
    """A module to quantize, with its spec."""

    module: nn.Linear | nn.Embedding
    spec: QuantSpec


def targets(model: "PreTrainedModel", scheme: QuantScheme) -> dict[str, Target]:
    """The modules to quantize and their specs by full name, in module order. Checks that each can be quantized.

    Raises:
        UserError: a pattern matches nothing, a group size does not divide, a weight is shared with another module, the type of a module
            cannot be quantized, or nothing is left to quantize.
    """
    linears = decoder_linears(model)
    _check_patterns(model, scheme.skip, linears)
    try:
        specs = scheme.of_linears({name: shape_of(linear) for name, linear in linears.items()})
    except ValueError as error:
        raise UserError(str(error)) from None
    chosen: dict[str, Target] = {name: Target(linears[name], spec) for name, spec in specs.items()} | _embedding_and_head(model, scheme)
    if not chosen:
        raise UserError("there is nothing to quantize: " + (f"skip={list(scheme.skip)} leaves no linear layer." if linears else _NONE))
    _check_shared(model, chosen, scheme)
    for name, target in chosen.items():
        _check_module(name, target)
    # embedding and head, appended above, move to their places
    return {name: chosen[name] for name, _ in model.named_modules() if name in chosen}


def check_zeros_held(specs: Mapping[str, QuantSpec], sparse: Iterable[str]) -> None:
    """Raises UserError if a pruned module would lose its zeros: some kinds have minimums, and 0 is not among their values."""
    for name in sparse:
        if name in specs and not specs[name].holds_zero:
            raise UserError(f"module {name} is pruned, and {no_zero(specs[name].kind)}")


def shape_of(linear: nn.Linear) -> tuple[int, int]:
    """(out, in)."""
    return linear.out_features, linear.in_features


def specs_of_ends(model: "PreTrainedModel", scheme: QuantScheme) -> dict[str, QuantSpec]:
    """The specs of embedding and head by these two words, as far as the scheme quantizes them."""
    embedding: Any = model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    head = "" if is_tied(model) else names.get(id(model.get_output_embeddings()), "")
    columns = embedding.weight.shape[-1] if hasattr(embedding, "weight") else 0
    return scheme.of_ends(columns, names.get(id(embedding), ""), head)


def _embedding_and_head(model: "PreTrainedModel", scheme: QuantScheme) -> dict[str, Target]:
    """Embedding and head, as far as the scheme quantizes them."""
    found = {}
    # one table cannot be rounded by two schemes
    if scheme.head and is_tied(model):
        raise UserError(
            "head: the head is tied to the embedding, whose table it multiplies by; use 'embedding', which then applies to both"
        )
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    for key, spec in specs_of_ends(model, scheme).items():
        module = ends[key]
        name = next((name for name, other in model.named_modules() if other is module), None)
        if name is None or not isinstance(module, nn.Linear | nn.Embedding):
            way = f"add {name or key} to skip" if getattr(scheme, key) is None else "leave the key out"
            raise UserError(f"{key}: the model has no plain {key} to quantize; {way}")
        # two settings that contradict each other: neither can be the one that was meant
        if any(fnmatchcase(name, pattern) for pattern in scheme.skip):
            raise UserError(f"{key}: skip matches {name}, which {key} quantizes; remove one of the two")
        found[name] = Target(module, spec)
    return found


def _check_patterns(model: nn.Module, skip: Sequence[str], linears: Iterable[str]) -> None:
    """Raises UserError for a pattern of ``skip`` that matches no linear and no embedding."""
    leaves = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in leaves):
            raise UserError(f"skip: {pattern!r} matches no linear layer of the model; {example_of(linears)}")


def _check_shared(model: "PreTrainedModel", chosen: Mapping[str, Target], scheme: QuantScheme) -> None:
    owners: dict[int, str] = {}
    # a quantized embedding may share its table with the head, which then reads the rounded table
    tied = id(model.get_input_embeddings().weight) if (scheme.embedding or scheme.mix) and is_tied(model) else None
    # lists a shared parameter once for each of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # folding gives a module a weight of its own, which would silently end the sharing
        first = owners.setdefault(id(parameter), name)
        for shared in (name, first):
            if first != name and shared.removesuffix(".weight") in chosen and id(parameter) != tied:
                raise UserError(
                    f"{shared} is shared between {first} and {name}; shared weights cannot be quantized. Add the module to skip."
                )


def _check_module(name: str, target: Target) -> None:
    module = target.module
    if isinstance(module, nn.Linear) and not is_plain_linear(module):
        raise UserError(
            f"module {name} is a {type(module).__name__}, not a plain nn.Linear; load the model unquantized, or add it to skip."
        )
    try:
        target.spec.group_width(module.weight.shape[1])
    except ValueError as error:
        raise UserError(f"module {name}: {error} (skip: ['{name}']).") from error


_NONE = "the model's decoder layers hold no nn.Linear; use a model of a family such as Llama, Mistral or Qwen."
