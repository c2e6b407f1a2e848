"""Quantizes inputs, keys and values too while calibrating, so that each layer sees what the layers before it will produce in serving.

The hooks are added once the weights of a layer are rounded. Its Hessians are taken before that: GPTQ sees the layer's unrounded inputs,
keys and values, computed from the outputs of the layers before it as they are served. Ranges for static scales are measured over all
calibration text without padding, in the layer with its weights rounded.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...models.calibration.replay import Replay
from ...models.common.errors import NonFiniteError
from ..layers.input_hooks import RoundedInputs, round_inputs
from ..layers.kv_cache_hooks import RoundedCache, cached_attentions, round_attention
from ..layers.rounders import Rounder, Rounders, watch_padding
from .methods import RoundingMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ServedLayers:
    """Quantizes inputs, keys and values as ``rounding`` specifies, layer by layer; does nothing if it specifies neither.

    Args:
        model: As in ``round_model``.
        rounding: Its ``activations`` and ``kv_cache``.
        replay: Runs a layer over the calibration text; needed for static scales.
        advance: Called with the tokens of every batch that is run for static scales.
    """

    def __init__(self, model: "PreTrainedModel", rounding: RoundingMethod, replay: Replay | None, advance: Callable[[int], None]) -> None:
        self._model, self._rounding, self._replay, self._advance = model, rounding, replay, advance
        self._attentions = cached_attentions(model) if rounding.kv_cache else {}
        self._padding = watch_padding(model) if rounding.activations or rounding.kv_cache else None
        self._inputs: dict[str, Rounder] = {}
        self._cache: dict[str, Rounder] = {}

    @property
    def rounds(self) -> bool:
        """Whether inputs, keys or values are quantized."""
        return self._padding is not None

    def layer(self, index: int, layer: nn.Module, names: Sequence[str]) -> None:
        """Hooks layer ``index``, whose linears ``names`` hold codes * scales, finds its static scales, and counts outliers.

        Raises:
            UserError: a linear or an attention does not run.
            NonFiniteError: an input, key or value is NaN or infinite on the text.
        """
        # neither inputs nor cache are rounded
        if self._padding is None:
            return
        hooked: list[Rounders] = []
        if self._rounding.activations:
            inputs = round_inputs(self._model, names, self._rounding.activations, self._padding)
            self._inputs |= inputs.rounders
            hooked.append(inputs)
        if self._rounding.kv_cache:
            # the attention modules of this layer alone
            inside = {id(module) for module in layer.modules()}
            rounders: dict[str, Rounder] = {}
            for name, module in self._attentions.items():
                if id(module) in inside:
                    rounders |= round_attention(name, module, self._rounding.kv_cache, self._padding)
            self._cache |= rounders
            hooked.append(RoundedCache(self._rounding.kv_cache, rounders))
        # most dynamic rounders have nothing to find, and families may have layers without attention
        self._observe(index, [rounders for rounders in hooked if rounders.spec.observes and rounders.rounders])

    def outliers(self) -> dict[str, tuple[int, int]]:
        """(columns with an outlier on the calibration text, columns) of each module's input; {} where the spec keeps none."""
        seen = {name: rounder.outlier_columns for name, rounder in self._inputs.items()}
        return {name: (int(columns.sum()), len(columns)) for name, columns in seen.items() if columns is not None}

    def _observe(self, index: int, observed: Sequence[Rounders]) -> None:
        if not observed:
            return
        assert self._replay is not None, "static scales need calibration text"
        for rounders in observed:
            rounders.observe()
        for number, _ in self._replay.batches():
            # static rounders note their ranges and round nothing, because they have no scale yet
            self._replay.run(index, number)
            self._advance(self._replay.tokens(number))
        # rounding of static rounders starts only here, so all of them were measured on unrounded inputs of this layer
        for rounders in observed:
            if rounders.spec.scaling == "dynamic":
                rounders.observe(False)
                continue
            found = rounders.extremes()
            for name, extremes in zip(rounders.rounders, found):
                if not bool(torch.isfinite(extremes).all()):
                    raise NonFiniteError(
                        f"the range of {name} is NaN or infinite on the calibration text; take an earlier checkpoint or more bits"
                    )
            rounders.observe(False)
            rounders.set_ranges(found)

    def state(self) -> dict[str, Any]:
        """The fields of a ``QuantState`` for inputs, keys and values."""
        found: dict[str, Any] = {}
        if self._rounding.activations:
            inputs = RoundedInputs(self._rounding.activations, self._inputs)
            found |= {"activations": inputs.spec, "input_scales": inputs.scales(), "input_zeros": inputs.zeros()}
        if self._rounding.kv_cache:
            found["cache"] = RoundedCache(self._rounding.kv_cache, self._cache).state()
        return found
