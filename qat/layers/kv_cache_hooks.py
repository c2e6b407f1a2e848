"""Quantizes keys and values as they enter the cache: in training, in calibration, in generation and when a stored model is measured.

    cache = round_cache(model, ActivationSpec(kind="fp8_e4m3"))                        dynamic: one scale per token and head
    cache = round_cache(model, ActivationSpec(kind="fp8_e4m3", scaling="static"))      per layer one scale for keys, one for values

Attention modules of transformers pass keys (after the rotary embedding) and values to ``past_key_values.update`` and use what it returns.
A stand-in for that cache rounds them and calls the real cache if there is one. So every implementation of attention (eager, sdpa, flash)
reads rounded keys and values, and nothing is rounded twice.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.common.errors import UserError
from ...models.families import decoder_layers
from ..codes.kv_cache_scales import CacheState
from ..spec import SCALE_GRIDS, ActivationSpec
from .rounders import Padding, Rounder, Rounders, watch_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARGUMENT = "past_key_values"
_SHARED = {
    "kv_lora_rank": "servers cache a compressed form of its keys and values",
    "num_kv_shared_layers": "some of its layers use the keys and values of others",
}
"""Config fields of families whose cache does not hold each layer's keys and values, with the reason."""


class _StandIn:
    """Takes the place of an attention module's cache."""

    def __init__(self, key: Rounder, value: Rounder) -> None:
        self._key, self._value = key, value
        self.cache: Any = None
        self.updated = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rounds keys and values [B, heads, S, head_dim]; returns them, after those of the real cache if there is one."""
        self.updated = True
        rounded = []
        for rounder, states in ((self._key, key_states), (self._value, value_states)):
            # ranges leave out padding, which is known as [B, S]
            rounder.note(states.transpose(1, 2))
            rounded.append(rounder.round(states))
        return (rounded[0], rounded[1]) if self.cache is None else self.cache.update(rounded[0], rounded[1], *args, **kwargs)

    # families also ask their cache for lengths and layers
    def __getattr__(self, name: str) -> Any:
        # not self.cache: before __init__ (copying) that would call __getattr__ without end
        cache = self.__dict__.get("cache")
        if cache is None:
            raise AttributeError(f"there is no cache, so it has no {name!r}")
        return getattr(cache, name)


class _Hooks:
    """The hooks of one attention module."""

    def __init__(self, name: str, module: nn.Module, stand_in: _StandIn) -> None:
        self._name, self._stand_in = name, stand_in
        # some families pass the cache by position, others by name
        self._position = list(inspect.signature(module.forward).parameters).index(_ARGUMENT)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Passes the stand-in instead of the cache."""
        at = self._position
        self._stand_in.cache = args[at] if len(args) > at else kwargs.get(_ARGUMENT)
        self._stand_in.updated = False
        if len(args) > at:
            return (*args[:at], self._stand_in, *args[at + 1 :]), kwargs
        return args, {**kwargs, _ARGUMENT: self._stand_in}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Releases the cache; UserError if the module did not use it."""
        # otherwise the hooks would keep the keys and values of the last batch in memory
        self._stand_in.cache = None
        if not self._stand_in.updated:
            raise UserError(f"kv_cache: {self._name} ({type(module).__name__}) puts no keys and values into its cache; leave kv_cache out")


class RoundedCache(Rounders):
    """The rounders of a model's keys and values: ``<attention module>.k`` and ``<attention module>.v``."""

    unseen = "{name}: this attention did not run on the text, so the range of its keys or values is not known; leave kv_cache out"

    def state(self) -> CacheState:
        """The part of a quantized folder that describes the cache."""
        attentions = dict.fromkeys(name.rpartition(".")[0] for name in self.rounders)
        return CacheState(spec=self.spec, attentions=tuple(attentions), scales=self.scales(), zeros=self.zeros())

    def set_ranges(self, extremes: Tensor) -> None:
        """Sets static scales from ranges, rounded to bf16, so that servers that store them in the model's dtype have the same numbers."""
        super().set_ranges(extremes)
        grid = SCALE_GRIDS["bf16_fp16"]
        for rounder in self.rounders.values():
            assert rounder.scale is not None
            rounder.scale = rounder.scale.to(torch.bfloat16).to(torch.float32).clamp(grid.smallest, grid.largest)


def cached_attentions(model: "PreTrainedModel") -> dict[str, nn.Module]:
    """The attention module of each decoder layer, by full name, in order: the module whose forward takes ``past_key_values``.

    Raises:
        UserError: the layers are not found, a layer has no or several such modules, or the family's cache does not hold each layer's keys
            and values.
    """
    config: Any = model.config.get_text_config()
    for field, reason in _SHARED.items():
        # such a cache holds something else than the keys and values that a hook would see
        if getattr(config, field, None):
            raise UserError(f"kv_cache: the cache of model type {config.model_type!r} cannot be quantized: {reason}; leave kv_cache out")
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    layers = decoder_layers(model)
    for layer in layers:
        # by the argument and not by name, because every family names its attention differently
        own = [m for m in layer.modules() if m is not layer and _ARGUMENT in inspect.signature(m.forward).parameters]
        if len(own) != 1:
            count = "no attention" if not own else f"{len(own)} modules"
            raise UserError(
                f"kv_cache: {names[id(layer)]} ({type(layer).__name__}) has {count} whose forward takes {_ARGUMENT}, not one; "
                "leave kv_cache out, or use a model such as Llama, Mistral, Qwen, Gemma or GPT-2"
            )
        found[names[id(own[0])]] = own[0]
    if not layers:
        raise UserError(f"kv_cache: the decoder layers of {type(model).__name__} are not found; leave kv_cache out")
    return found


def round_attention(name: str, module: nn.Module, spec: ActivationSpec, padding: Padding) -> dict[str, Rounder]:
    """Makes one attention module round its keys and values from now on; returns its two rounders by name."""
    rounders = {f"{name}.{part}": Rounder(spec, padding) for part in ("k", "v")}
    hooks = _Hooks(name, module, _StandIn(*rounders.values()))
    # both ends of the forward pass: the stand-in goes in before and the cache is released after
    module.register_forward_pre_hook(hooks.before, with_kwargs=True)
    module.register_forward_hook(hooks.after)
    return rounders


def round_cache(model: "PreTrainedModel", spec: ActivationSpec, padding: Padding | None = None) -> RoundedCache:
    """Makes every attention module round its keys and values. Static scaling begins once it has ranges (without padding, as for inputs).

    Args:
        model: Any causal language model of transformers whose layers keep their own keys and values, on any device (also meta).
        spec: Their quantization. dynamic: one scale per token and head; static: per layer one scale for keys and one for values.
        padding: A hook that already watches the backbone, or None.

    Raises:
        UserError: as ``cached_attentions``; later, in a forward pass, if a module uses no cache.

    Source: Liu et al., LLM-QAT, arXiv 2305.17888, section 2.2 (keys and values are rounded per token in training).
    """
    attentions = cached_attentions(model)
    padding = padding or watch_padding(model)
    rounders: dict[str, Rounder] = {}
    for name, module in attentions.items():
        rounders |= round_attention(name, module, spec, padding)
    return RoundedCache(spec, rounders)


def round_cache_as_stored(model: "PreTrainedModel", stored: CacheState) -> RoundedCache:
    """``round_cache`` with the scales of a quantized folder or an export.

    Raises:
        UserError: as ``round_cache``, or the stored attention modules are not those of the model.
    """
    cache = round_cache(model, stored.spec)
    if (found := cache.state().attentions) != stored.attentions:
        # the sets are equal if only the order differs
        other = next(iter(set(found) ^ set(stored.attentions)), found[0])
        raise UserError(f"kv_cache: the stored scales are not those of this model's attention modules ({other}); quantize again")
    cache.set_scales(stored.scales, stored.zeros)
    return cache
