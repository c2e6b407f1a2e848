"""Reads what decoder layers compute while a model runs: the hidden states that they return, their queries, keys and values.

Forward hooks are set for one pass and removed after it, so a model computes the same with and without them, and copies of it have none.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import unwrapped
from .common.errors import UserError
from .dimensions import hidden_size
from .eval_mode import eval_mode
from .families import backbone_and_head, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTIONS: Mapping[str, str] = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
"""What is read of attention -> the linear of a layer that computes it, before positions are added."""


@dataclass
class Seen:
    """What one pass has computed, with its autograd graph."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> the hidden states that it returns, [B, S, H], before any final norm."""
    vectors: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """(layer, one of q, k, v) -> vectors of all heads side by side, [B, S, W]."""
    runs: Counter[int] = field(default_factory=Counter)
    """How often each layer has run."""


@contextmanager
def seen_inside(model: "PreTrainedModel", hidden: Collection[int], vectors: Collection[tuple[int, str]] = ()) -> Iterator[Seen]:
    """Records what passes inside the block compute.

    Args:
        model: A model that ``check_layers`` accepts, on any device, whole or sharded.
        hidden: Layers whose hidden states are recorded, counted from 0.
        vectors: Queries (q), keys (k) or values (v) of layers.
    """
    layers, found = decoder_layers(unwrapped(model)), Seen()
    handles: list[Any] = []

    def keep_hidden(index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            # some families return a tuple whose first part is the stream
            found.hidden[index] = output[0] if isinstance(output, tuple) else output
            found.runs[index] += 1

        return hook

    def keep_vectors(place: tuple[int, str]) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found.vectors[place] = output

        return hook

    try:
        # registered last, so they see what hooks of sharding and offloading leave
        handles += [layers[index].register_forward_hook(keep_hidden(index)) for index in sorted(set(hidden))]
        for index, word in sorted(set(vectors)):
            handles.append(_projection(layers[index], word).register_forward_hook(keep_vectors((index, word))))  # pyright: ignore[reportOptionalMemberAccess]
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_layers(model: "PreTrainedModel", who: str, layers: Collection[int], vectors: Collection[tuple[int, str]] = ()) -> None:
    """Checks that hidden states, queries, keys and values of a model can be read; runs four tokens, except on the meta device.

    Args:
        model: The model; who: its name in messages, such as 'the teacher'.
        layers: Layers whose hidden states are read; vectors: as for ``seen_inside``.

    Raises:
        UserError: the decoder layers are not found, a layer does not return one hidden state per token or runs more than once, or its
            attention has no linears of its own for queries, keys and values.
    """
    base = unwrapped(model)
    found, kind = decoder_layers(base), str(base.config.model_type)
    if not found:
        raise UserError(f"{who} (model type {kind!r}) has no list of decoder layers, so its hidden states cannot be read; {_REMEDY}")
    # in a fixed order, so that the same model gets the same message
    for index, word in sorted(vectors, key=lambda place: (place[0], list(PROJECTIONS).index(place[1]))):
        if _projection(found[index], word) is None:
            raise UserError(
                f"{who} (model type {kind!r}): layer {index} has no {PROJECTIONS[word]}, so relations of its attention cannot be read; use "
                "features: {hidden: ...}, or remove loss.features"
            )
    backbone, weight, _ = backbone_and_head(model)
    if weight.is_meta or any(parameter.is_meta for parameter in base.parameters()):
        return
    ids = torch.arange(4, device=weight.device).remainder(weight.shape[0])[None]
    with torch.no_grad(), eval_mode(base), seen_inside(model, layers, vectors) as seen:
        backbone(input_ids=ids, use_cache=False)
    wanted = (1, 4, hidden_size(base))
    for index in layers:
        states = seen.hidden.get(index)
        if not isinstance(states, Tensor) or tuple(states.shape) != wanted or seen.runs[index] != 1:
            got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            times = f", in {seen.runs[index]} runs" if seen.runs[index] != 1 else ""
            raise UserError(
                f"{who} (model type {kind!r}): layer {index} returns {got} for four tokens{times}, not one hidden state "
                f"{wanted} in one run, so its hidden states cannot be read; {_REMEDY}"
            )


_REMEDY = "remove loss.features, or use models of another family"


def vector_width(model: "PreTrainedModel", layer: int, word: str) -> int:
    """Numbers per token of a layer's queries (q), keys (k) or values (v); the layer must have passed ``check_layers``."""
    linear: Any = _projection(decoder_layers(unwrapped(model))[layer], word)
    return int(linear.out_features)


def _projection(layer: nn.Module, word: str) -> nn.Module | None:
    """The linear of a layer's attention that computes queries, keys or values; None if there is none of its own."""
    for module in layer.modules():
        parts = dict(module.named_children())
        # all three: a module with one of the names alone is something else
        if all(name in parts for name in PROJECTIONS.values()):
            return parts[PROJECTIONS[word]]
    return None
