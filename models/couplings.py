"""Where a scale of one tensor's channels can be undone in another: norm and its readers, values and attention output, FFN in and out.

Dividing the producer's outputs by a positive number per channel and multiplying the readers' inputs by it leaves the model as it is. Which
tensors these are says the axis map of the family (``family_map``). The file imports no torch, because plans ask it.
"""

from dataclasses import dataclass
from typing import Any

from .axis_map import Family
from .family_map import FAMILIES
from .sizes import sizes_of


@dataclass(frozen=True)
class Coupling:
    """A producer in a decoder layer and the matrices that read its outputs, all of them."""

    producer: str
    """Module inside the layer; of a fused matrix the last part of the outputs is meant."""
    readers: tuple[str, ...]
    """Matrices inside the layer."""
    norm: bool = False
    """The producer is a norm."""
    group: int = 1
    """Query heads that read one head of values: each block of ``block`` channels of the producer is read this many times."""
    block: int = 1
    """Channels of a head; 1 where every channel is read once."""


def couplings(config: Any) -> list[Coupling]:
    """The couplings of each decoder layer of a model, in the order in which the layer runs; [] for a family without an axis map."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return []
    sizes = sizes_of(config, family)
    values = Coupling(family.value, (family.attention_out,), group=sizes.group, block=sizes.head_dim)
    norms: dict[str, list[str]] = {}
    for place, readers in family.readers().items():
        # two places may read one norm: a scale of it must be undone in both
        if (norm := _norm_before(config, family, place)) is not None:
            norms.setdefault(norm, []).extend(readers)
    before = [Coupling(norm, tuple(readers), norm=True) for norm, readers in norms.items()]
    inner = [Coupling(family.ffn_in, (family.ffn_out,))] if family.ffn_in and _passes_scales(config, family) else []
    return [*before[:1], values, *before[1:], *inner]


def uncoupled(config: Any) -> list[str]:
    """Matrices of a layer whose inputs no coupling scales."""
    scaled = {reader for one in couplings(config) for reader in one.readers}
    return [name for name in FAMILIES[config.model_type].matrices if name not in scaled]


def output_norms(config: Any, family: Family) -> list[str]:
    """Norms of a layer over the hidden channels with nothing but the residual stream behind them: their gains have nowhere to go."""
    before = {norm for place in family.readers() if (norm := _norm_before(config, family, place)) is not None}
    norms = [name.removesuffix(".weight") for name, entry in family.layer.items() if entry == ("hidden",) and name.endswith(".weight")]
    return [name for name in norms if name not in before]


def _norm_before(config: Any, family: Family, place: str) -> str | None:
    if family.norms_before_field is not None and not getattr(config, family.norms_before_field, True):
        return None
    return family.norms_before.get(place)


def _passes_scales(config: Any, family: Family) -> bool:
    return family.ffn_relu is None or getattr(config, family.ffn_relu, None) == "relu"
