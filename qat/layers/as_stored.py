"""Adds to a plain model the quantization of inputs, keys and values that its quantized folder records."""

from typing import TYPE_CHECKING

from ..codes.state import QuantState
from .input_hooks import round_inputs_as_stored
from .kv_cache_hooks import round_cache_as_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rounds_more_than_weights(record: dict[str, object] | None) -> bool:
    """Whether the ``quant`` entry of a ``decoct.json`` has quantized inputs, or quantized keys and values."""
    return bool(record) and any(record.get(key) for key in ("activations", "kv_cache"))


def round_as_stored(model: "PreTrainedModel", state: QuantState) -> None:
    """Hooks the quantization of inputs, keys and values in ``state`` into a model; UserError as ``round_cache_as_stored``."""
    if state.activations is not None:
        round_inputs_as_stored(model, state.modules, state.activations, state.input_scales, state.input_zeros)
    if state.cache is not None:
        round_cache_as_stored(model, state.cache)
