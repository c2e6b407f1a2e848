"""What decoct.json says of a cut: the indices that were kept of the parent, and of the first model of the chain (``root``)."""

from collections.abc import Mapping
from typing import Any

from ..axis_map import Family
from ..sizes import Sizes
from .kept import Kept

ROOT = "root"
"""Entry of decoct.json: shape of the model that was cut first, and the indices of it that are left. Later stages hand it on."""


def kept_of(record: Any, family: Family, total: int) -> Kept | None:
    """The indices of an entry ``kept`` (``Kept.record``); None if it is not one.

    Args:
        record: The entry.
        family: The model's.
        total: Layers of the parent.
    """
    if not isinstance(record, dict):
        return None
    layers = record.get("layers", list(range(total)))
    owners = {"ffn": family.ffn, "heads": family.attention, "kv_heads": family.attention}
    try:
        chosen: dict[str, Any] = {
            axis: [_indices(record[axis][f"{family.layers_path}.{layer}.{module}"]) for layer in _indices(layers)]
            for axis, module in owners.items()
            if axis in record
        }
        hidden = _indices(record["hidden"]) if "hidden" in record else None
        return Kept(layers=_indices(layers), hidden=hidden, **chosen)
    except (KeyError, TypeError, ValueError):
        return None


def _indices(given: Any) -> list[int]:
    if not isinstance(given, list) or not all(type(index) is int and index >= 0 for index in given) or not given:
        raise ValueError(given)
    return list(given)


def root_of(record: Mapping[str, Any], family: Family, sizes: Sizes) -> tuple[Sizes, Kept] | None:
    """(sizes of the first model of the chain, the indices of it that a model still has), by the model's decoct.json.

    None if the record has no such entry, or one that does not give the model's ``sizes``: another tool changed the shape since.
    """
    entry: Any = record.get(ROOT, {})
    if not entry and "kept" in record and "parent_shape" in record:
        # a folder of a version that recorded the parent alone
        entry = {"shape": record["parent_shape"], "kept": record["kept"]}
    try:
        first = Sizes(**entry["shape"])
        kept = kept_of(entry["kept"], family, first.layers)
        # a record may have been edited: numbers that are no numbers raise here
        fits = kept is not None and kept.sizes(first) == sizes and _inside(kept, first)
    except (TypeError, KeyError):
        return None
    return (first, kept) if kept is not None and fits else None


def _inside(kept: Kept, first: Sizes) -> bool:
    """Whether the indices are of the model, as many in each layer."""
    widths = ((first.ffn, kept.ffn), (first.heads, kept.heads), (first.kv_heads, kept.kv_heads))
    return (
        max(kept.layers) < first.layers
        and (kept.hidden is None or max(kept.hidden) < first.hidden)
        and all(max(map(max, lists)) < number and len(set(map(len, lists))) == 1 for number, lists in widths if lists is not None)
    )


def root_record(record: Mapping[str, Any], family: Family, before: Sizes, kept: Kept) -> dict[str, Any]:
    """The entry ``root`` of a model that is cut from one with this record.

    Args:
        record: decoct.json of the parent.
        family: The parent's.
        before: Sizes of the parent, which is the root itself if its record has none.
        kept: What the cut keeps of the parent.
    """
    found = root_of(record, family, before)
    first, composed = (before, kept) if found is None else (found[0], kept.of_root(found[1]))
    return {"shape": first.record(), "kept": composed.record(family, first.layers)}
