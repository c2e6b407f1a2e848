"""The sizes of a model along its axes, and the sizes that structured pruning may cut it to. It imports no torch: plans ask here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .axis_map import AXES, Axis, Family
from .common.errors import UserError
from .common.terminal_text import counted
from .settings import allowed_layers

ChannelScore = Literal["weight_activation", "activation", "magnitude", "taylor"]
DepthScore = Literal["block_influence", "greedy_loss", "contiguous"]
WORDS: Mapping[Axis, str] = {
    "ffn": "FFN channels",
    "heads": "query heads",
    "kv_heads": "key/value heads",
    "hidden": "hidden channels",
    "layers": "layers",
}
"""Axis -> what it counts."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shape of a model."""

    ffn: int
    """FFN channels of each layer."""
    heads: int
    """Query heads of each layer."""
    kv_heads: int
    """Heads of keys and values; each serves ``heads / kv_heads`` query heads, which are a group."""
    hidden: int
    """Channels of the hidden states."""
    layers: int
    """Decoder layers."""
    head_dim: int
    """Channels of a head; pruning never changes it, because rotary positions pair its channels."""

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def of(self, axis: Axis) -> int:
        """The size along an axis."""
        return getattr(self, axis)

    def width(self, part: str) -> int:
        """Rows or columns of one part of a tensor's dimension, as the axis map names it; 0 for a dimension that is never cut."""
        if part in ("heads", "kv_heads"):
            return getattr(self, part) * self.head_dim
        return getattr(self, part) if part else 0

    def record(self) -> dict[str, int]:
        """The sizes as plain data, for decoct.json."""
        return {axis: self.of(axis) for axis in AXES} | {"head_dim": self.head_dim}


def sizes_of(config: Any, family: Family) -> Sizes:
    """The sizes that a config states."""
    number = {axis: getattr(config, field) for axis, field in family.fields.items()}
    # GPT-2 without n_inner has four times the hidden size
    number["ffn"] = number["ffn"] or 4 * number["hidden"]
    heads, hidden = number["heads"], number["hidden"]
    head_dim = (getattr(config, "head_dim", None) if family.own_head_dim else None) or hidden // heads
    return Sizes(**{**number, "kv_heads": number.get("kv_heads") or heads}, head_dim=head_dim)


def target_sizes(config: Any, family: Family, kept: Mapping[Axis, int]) -> Sizes:
    """The sizes of the student that keeps ``kept`` of the model of ``config``; axes that are not given stay as they are.

    Fewer key/value heads take their query heads with them. In a model where every query head has its own keys and values, fewer heads mean
    fewer of both.

    Raises:
        UserError: no model of the family has this shape; the message gives one that it has.
    """
    # first: transformers gives no size that differs by layer
    if getattr(config, "is_heterogeneous", False):
        raise UserError("the config has per_layer_config (layers of different shapes); structured pruning needs equal layers")
    sizes = sizes_of(config, family)
    kept = {axis: kept[axis] for axis in AXES if axis in kept}
    for axis, number in kept.items():
        if number < 1:
            raise UserError(f"structured.{axis}={number} would remove all {WORDS[axis]}; give at least 1")
        if number > sizes.of(axis):
            raise UserError(
                f"structured.{axis}={number} keeps more {WORDS[axis]} than the student's {sizes.of(axis)}; give at most {sizes.of(axis)}"
            )
    if all(number == sizes.of(axis) for axis, number in kept.items()):
        what = " and ".join(f"structured.{axis}={number}" for axis, number in kept.items())
        words = " and ".join(WORDS[axis] for axis in kept)
        verb = "keeps" if len(kept) == 1 else "keep"
        raise UserError(f"{what} {verb} all {words}, so that nothing is pruned; give fewer")
    target = Sizes(**{**sizes.record(), **kept, **_heads(sizes, kept)})
    _check_depth(config, sizes, target)
    _check_hidden(config, family, sizes, target, kept)
    return target


def fixed_depth(config: Any) -> str | None:
    """Why a model computes something else in a layer of another number, so that no layer can be removed; None if it does not."""
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "the model divides each layer's attention by the layer's number (scale_attn_by_inverse_layer_idx), which would change"
    return None


def _heads(sizes: Sizes, kept: Mapping[Axis, int]) -> dict[str, int]:
    """Query heads and key/value heads that are kept: the same number of query heads for each key/value head."""
    given = kept.get("heads")
    # each query head has its own keys and values: they go together
    own = sizes.kv_heads == sizes.heads and given is not None
    keys = kept.get("kv_heads", given if own and given else sizes.kv_heads)
    heads = keys * sizes.group if given is None else given
    if heads % keys or heads > keys * sizes.group:
        fitting = [keys * number for number in range(1, sizes.group + 1)]
        with_keys = f"structured.kv_heads={keys}" if "kv_heads" in kept else f"the model's {counted(keys, 'key/value head')}"
        raise UserError(
            f"structured.heads={heads} does not go with {with_keys}: every key/value head keeps the same number of query heads, at most "
            f"{sizes.group}; give heads {_either(fitting)}, or fewer kv_heads"
        )
    return {"heads": heads, "kv_heads": keys}


def _check_depth(config: Any, sizes: Sizes, target: Sizes) -> None:
    if target.layers == sizes.layers:
        return
    if target.layers < min(2, sizes.layers):
        raise UserError(f"structured.layers={target.layers}: the first and the last layer are always kept; {allowed_layers(sizes.layers)}")
    if reason := fixed_depth(config):
        raise UserError(f"structured.layers={target.layers}: {reason}; leave 'layers' out")


def _check_hidden(config: Any, family: Family, sizes: Sizes, target: Sizes, kept: Mapping[Axis, int]) -> None:
    """Raises UserError if the family's code or config class does not take the target's hidden size with its heads."""
    hidden, heads, head_dim = target.hidden, target.heads, target.head_dim
    if (hidden, heads) == (sizes.hidden, sizes.heads):
        return
    given = " ".join(f"structured.{axis}={number}" for axis, number in kept.items() if axis in ("heads", "kv_heads", "hidden"))
    if (table := getattr(config, "word_embed_proj_dim", None) or sizes.hidden) != sizes.hidden:
        raise UserError(
            f"{given}: this {family.name} has an embedding of {table} channels beside hidden states of {sizes.hidden} "
            "(word_embed_proj_dim), which decoct does not cut; prune 'ffn' and 'layers' alone"
        )
    if not family.own_head_dim and hidden != heads * head_dim:
        raise UserError(
            f"{given}: {family.name} has no head_dim of its own, it is hidden / heads ({head_dim}); cut both together, such as "
            f"structured.heads={heads} structured.hidden={heads * head_dim}, or neither"
        )
    if family.whole_heads and hidden % heads:
        fitting = _around(hidden, heads, sizes.hidden)
        raise UserError(
            f"{given}: transformers takes no {family.name} whose hidden size ({hidden}) is not a multiple of its query heads ({heads}); "
            f"give structured.hidden={_either(fitting)}, or other heads"
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    # the config class counts its factors by hidden / heads, whatever head_dim is
    if family.name == "phi3" and rotary.get("long_factor") and hidden // heads != head_dim:
        raise UserError(
            f"{given}: transformers takes longrope factors of a phi3 only while hidden / heads is head_dim ({head_dim}); cut both "
            f"together, such as structured.heads={heads} structured.hidden={heads * head_dim}"
        )


def _around(number: int, unit: int, most: int) -> list[int]:
    """The multiples of ``unit`` next to ``number``, from ``unit`` to ``most``."""
    below = number - number % unit
    return [near for near in (below, below + unit) if unit <= near <= most]


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers)) if len(numbers) < 4 else f"{numbers[0]}, {numbers[1]}, .. or {numbers[-1]}"
