"""A plain model made to compute as its quantized folder says, beyond its weights: inputs, keys and values rounded."""

from typing import TYPE_CHECKING

from ..codes.state import QuantState
from .input_hooks import round_inputs_as_stored
from .kv_cache_hooks import round_cache_as_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rounds_more_than_weights(record: dict[str, object] | None) -> bool:
    """Whether the ``quant`` entry of a ``decoct.json`` speaks of rounded inputs, or rounded keys and values."""
    return bool(record) and any(record.get(key) for key in ("activations", "kv_cache"))


def round_as_stored(model: "PreTrainedModel", state: QuantState) -> None:
    """Hook the rounding of ``state`` into a model with its weights, where there is any; UserError as ``round_cache_as_stored``."""
    if state.activations is not None:
        round_inputs_as_stored(model, state.modules, state.activations, state.input_scales, state.input_zeros)
    if state.cache is not None:
        round_cache_as_stored(model, state.cache)
