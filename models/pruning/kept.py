"""Indices that a cut keeps along each axis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..axis_map import Family
from ..sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Kept indices of the parent, ascending. None along an axis keeps all of it."""

    layers: list[int]
    """Layers of the parent; the lists per layer below are of these, in this order."""
    ffn: list[list[int]] | None = None
    """FFN channels, per kept layer."""
    heads: list[list[int]] | None = None
    """Query heads, per kept layer."""
    kv_heads: list[list[int]] | None = None
    """Key/value heads, per kept layer."""
    hidden: list[int] | None = None
    """Channels of the hidden states: one set for the whole model."""

    def of(self, axis: str, position: int | None) -> list[int] | None:
        """Indices along an axis in the ``position``-th kept layer; outside the layers (None) there is only ``hidden``."""
        if axis == "hidden":
            return self.hidden
        # '' is a dimension that is never cut
        chosen: list[list[int]] | None = getattr(self, axis) if axis else None
        return None if chosen is None or position is None else chosen[position]

    def sizes(self, before: Sizes) -> Sizes:
        """The sizes after the cut."""
        changed: dict[str, int] = {"layers": len(self.layers)}
        if self.hidden is not None:
            changed["hidden"] = len(self.hidden)
        for axis in ("ffn", "heads", "kv_heads"):
            if (per_layer := getattr(self, axis)) is not None:
                changed[axis] = len(per_layer[0])
        return Sizes(**{**before.record(), **changed})

    def of_root(self, first: "Kept") -> "Kept":
        """These indices, of a model that ``first`` was cut to, as indices of the model that ``first`` was cut from."""

        def inside(own: list[list[int]] | None, theirs: list[list[int]] | None) -> list[list[int]] | None:
            if theirs is None:
                return own
            if own is None:
                return [theirs[layer] for layer in self.layers]
            return [[theirs[layer][index] for index in indices] for layer, indices in zip(self.layers, own, strict=True)]

        hidden = self.hidden if first.hidden is None else [first.hidden[index] for index in self.hidden or range(len(first.hidden))]
        return Kept(
            layers=[first.layers[layer] for layer in self.layers],
            ffn=inside(self.ffn, first.ffn),
            heads=inside(self.heads, first.heads),
            kv_heads=inside(self.kv_heads, first.kv_heads),
            hidden=hidden,
        )

    def record(self, family: Family, total: int) -> dict[str, Any]:
        """For decoct.json: axis -> indices of the parent, those inside layers by the parent's module; axes that were cut alone.

        Args:
            family: The model's.
            total: Layers of the parent.
        """
        found: dict[str, Any] = {}
        for axis, module in _owners(family).items():
            if (per_layer := getattr(self, axis)) is not None:
                found[axis] = {f"{family.layers_path}.{layer}.{module}": kept for layer, kept in zip(self.layers, per_layer)}
        if self.hidden is not None:
            found["hidden"] = self.hidden
        if len(self.layers) < total:
            found["layers"] = self.layers
        return found

    @classmethod
    def from_record(cls, entry: Mapping[str, Any], family: Family, total: int) -> "Kept":
        """The inverse of ``record``; KeyError if a layer that was kept has no list.

        Args:
            entry: The entry ``kept`` of decoct.json.
            family: The model's.
            total: Layers of the parent.
        """
        layers = list(entry.get("layers", range(total)))
        inside = {
            axis: [list(entry[axis][f"{family.layers_path}.{layer}.{module}"]) for layer in layers]
            for axis, module in _owners(family).items()
            if axis in entry
        }
        return cls(layers=layers, hidden=list(entry["hidden"]) if "hidden" in entry else None, **inside)


def _owners(family: Family) -> dict[str, str]:
    """Axis inside the layers -> the module of a layer by which the record names its indices."""
    return {"ffn": family.ffn, "heads": family.attention, "kv_heads": family.attention}
