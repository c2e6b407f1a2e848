"""Layers that round more than their weights: hooked in once a layer's weights are rounded, so that the next layer is calibrated on what a
served one gives.

The Hessians of a layer are taken before: GPTQ sees its unrounded inputs, keys and values, given what the layers before it give as they are
served. Ranges behind static scales are those of all calibration text, padding left out, in the layer with its weights rounded.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...models.common.errors import NonFiniteError
from ..layers.input_hooks import RoundedInputs, round_inputs
from ..layers.kv_cache_hooks import RoundedCache, cached_attentions, round_attention
from ..layers.rounders import Rounder, Rounders, watch_padding
from .methods import RoundingMethod
from .replay import Replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ServedLayers:
    """Rounds what ``rounding`` says of inputs, keys and values, layer by layer; does nothing where it says nothing.

    Args:
        model: As in ``round_model``.
        rounding: Its ``activations`` and ``kv_cache``.
        replay: Runs a layer over the calibration text; needed for static scales.
        advance: Told the tokens of every batch that was looked at for them.
    """

    def __init__(self, model: "PreTrainedModel", rounding: RoundingMethod, replay: Replay | None, advance: Callable[[int], None]) -> None:
        self._model, self._rounding, self._replay, self._advance = model, rounding, replay, advance
        self._attentions = cached_attentions(model) if rounding.kv_cache else {}
        self._padding = watch_padding(model) if rounding.activations or rounding.kv_cache else None
        self._inputs: dict[str, Rounder] = {}
        self._cache: dict[str, Rounder] = {}

    @property
    def rounds(self) -> bool:
        """Whether more than weights is rounded."""
        return self._padding is not None

    def layer(self, index: int, layer: nn.Module, names: Sequence[str]) -> None:
        """Hook layer ``index``, whose linears ``names`` hold codes * scales, and find its static scales.

        Raises:
            UserError: a linear or an attention does not run.
            NonFiniteError: an input, key or value is NaN or infinite on the text.
        """
        if self._padding is None:
            return
        hooked: list[Rounders] = []
        if self._rounding.activations:
            inputs = round_inputs(self._model, names, self._rounding.activations, self._padding)
            self._inputs |= inputs.rounders
            hooked.append(inputs)
        if self._rounding.kv_cache:
            inside = {id(module) for module in layer.modules()}
            rounders: dict[str, Rounder] = {}
            for name, module in self._attentions.items():
                if id(module) in inside:
                    rounders |= round_attention(name, module, self._rounding.kv_cache, self._padding)
            self._cache |= rounders
            hooked.append(RoundedCache(self._rounding.kv_cache, rounders))
        self._find_ranges(index, [rounders for rounders in hooked if rounders.spec.scaling == "static" and rounders.rounders])

    def _find_ranges(self, index: int, static: Sequence[Rounders]) -> None:
        if not static:
            return
        assert self._replay is not None, "static scales need calibration text"
        for rounders in static:
            rounders.observe()
        for number, _ in self._replay.batches():
            self._replay.run(index, number)
            self._advance(self._replay.tokens(number))
        for rounders in static:
            found = rounders.extremes()
            for name, extremes in zip(rounders.rounders, found):
                if not bool(torch.isfinite(extremes).all()):
                    raise NonFiniteError(
                        f"the range of {name} is NaN or infinite on the calibration text; take an earlier checkpoint, or more bits"
                    )
            rounders.observe(False)
            rounders.set_ranges(found)

    def state(self) -> dict[str, Any]:
        """Fields of a ``QuantState``."""
        found: dict[str, Any] = {}
        if self._rounding.activations:
            inputs = RoundedInputs(self._rounding.activations, self._inputs)
            found |= {"activations": inputs.spec, "input_scales": inputs.scales(), "input_zeros": inputs.zeros()}
        if self._rounding.kv_cache:
            found["cache"] = RoundedCache(self._rounding.kv_cache, self._cache).state()
        return found
