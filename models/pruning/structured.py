"""Structured pruning: the dense model becomes smaller, and every server runs it faster.

A student is built from its own config and filled with the parent's tensors, each cut as the family's axis map says. So everything that a
module derives from the config (numbers of heads, cache slots, kinds of attention) is right by construction.
"""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..axis_map import Family, check_map
from ..common.errors import UserError
from ..family_map import family_of
from ..kept_layers import cut_config
from ..sizes import Sizes, sizes_of
from ..ties import is_tied
from .kept import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def cut(model: "PreTrainedModel", kept: Kept, *, dtype: torch.dtype | None = None, release: bool = False) -> "PreTrainedModel":
    """The student that keeps these parts of ``model``.

    It computes what ``model`` does with the other parts set to zero: FFN activations, outputs of heads, channels of the hidden states;
    dropped layers hand their input on. RMSNorms whose mean is over fewer channels get the factor sqrt(before / after), which makes that
    exact but for the norm's epsilon, and so do embeddings that the family's code multiplies by sqrt(hidden). A LayerNorm subtracts a mean
    of its own over the channels that are left, which no factor undoes.

    Args:
        model: A model of a family with an axis map. If it is on the meta device, the student is too.
        kept: The parts that stay.
        dtype: Type of the student's weights; None = that of ``model``.
        release: Free each tensor of ``model`` once it is copied, so that both never are in memory; ``model`` cannot be used afterwards.

    Returns:
        The student on the device of ``model``, in eval mode, with its own config.

    Raises:
        UserError: the family has no map, or the model a tensor that the map does not have.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    family = family_of(model)
    check_map(family, model.state_dict())
    before = sizes_of(model.config, family)
    after = kept.sizes(before)
    config = cut_config(model.config, family, after, kept.layers)
    device = model.device
    # every weight is copied below, so drawing random ones would only take time
    with torch.device(device), no_init_weights():
        student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype or model.dtype)
    student.tie_weights()  # part of the initialisation that was left out
    if model.generation_config is not None:
        # a copy: what is changed for the student must not change the parent
        student.generation_config = copy.deepcopy(model.generation_config)
    # a parent on the meta device has no values to copy
    if device.type != "meta":
        _fill(student, model, family, kept, norm_factors(model, before, after), release)
    return student.eval()


def norm_factors(model: "PreTrainedModel", before: Sizes, after: Sizes) -> dict[str, float]:
    """Factors that make the sliced model equal the masked one: name of a norm (of the parent) or of the embedding -> factor.

    An RMSNorm over n channels, of which m are left, divides by a mean that is n/m times as large: sqrt(n/m) undoes it.
    """
    family = family_of(model)
    factors: dict[str, float] = {}
    if family.layer_norm:
        return factors
    for index in range(before.layers):
        for norm in family.rms_norms:
            # the axis of the norm's weight is the one of its mean: 'hidden', or all heads together (OLMo 2)
            axis: Any = family.layer[f"{norm}.weight"][0]
            factors[f"{family.layers_path}.{index}.{norm}"] = math.sqrt(before.of(axis) / after.of(axis))
    hidden = math.sqrt(before.hidden / after.hidden)
    factors[family.final_norm] = hidden
    if family.scaled_embedding:
        factors[family.embedding] = hidden
        if is_tied(model):
            # the head multiplies by the same, larger table
            factors[family.final_norm] = 1.0
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def scaled_norm(weight: Tensor, factor: float, offset: float) -> Tensor:
    """Weight of an RMSNorm that gives ``factor`` times the output; ``offset`` is what the family's code adds to the weight."""
    return factor * (weight + offset) - offset


def _fill(
    student: "PreTrainedModel", model: "PreTrainedModel", family: Family, kept: Kept, factors: Mapping[str, float], release: bool
) -> None:
    """Copies the cut tensors of ``model`` into ``student``."""
    # of tied tensors this has the first name alone, in the student too
    source = dict(model.named_parameters())
    before = sizes_of(model.config, family)
    for name, target in student.named_parameters():
        origin = family.source(name, kept.layers)
        position, _ = family.place(name)
        value = sliced(source[origin], family, origin, kept, position, before)
        owner = origin.rpartition(".")[0]
        if (factor := factors.get(owner)) is not None:
            value = value * factor if owner == family.embedding else scaled_norm(value, factor, family.norm_offset)
        target.copy_(value)
        if release:
            source[origin].data = source[origin].data.new_empty(0)


def sliced(tensor: Tensor, family: Family, name: str, kept: Kept, position: int | None, before: Sizes) -> Tensor:
    """A tensor of the parent without what the cut removes.

    Args:
        tensor: The tensor.
        family: The model's.
        name: Its full name in the parent.
        kept: What stays.
        position: Number of its layer among the kept ones; None outside the layers.
        before: Sizes of the parent.

    Raises:
        UserError: a dimension is not as wide as the map and the config say.
    """
    entry = family.entry(name)
    assert entry is not None, name
    for dim, axes in enumerate(entry):
        if (found := kept_rows(axes, kept, position, before)) is None:
            continue
        if (width := dimension_width(axes, before)) != tensor.shape[dim]:
            raise UserError(f"{name} has {tensor.shape[dim]} {axes} where its config says {width}; make the model folder again")
        # indices on the tensor's own device: layers may lie on several
        tensor = tensor.index_select(dim, torch.tensor(found, device=tensor.device))
    return tensor


def formula(family: Family, shapes: Mapping[str, Sequence[int]], sizes: Sizes) -> int:
    """Parameters of a model of ``sizes``, counted by the axis map.

    Args:
        family: The model's.
        shapes: Shape of each parameter of any model of the same kind, tied ones once. They say which parameters there are, and how long the
            dimensions without an axis are; the layers count as often as ``sizes`` has them.
        sizes: The sizes.
    """
    inside = outside = 0
    for name, shape in shapes.items():
        entry = family.entry(name)
        assert entry is not None, name
        count = math.prod(dimension_width(axes, sizes) if axes else size for axes, size in zip(entry, shape, strict=True))
        layer = family.place(name)[0]
        # all layers have the same tensors
        inside += count if layer == 0 else 0
        outside += count if layer is None else 0
    return inside * sizes.layers + outside


def dimension_width(axes: str, sizes: Sizes) -> int:
    """Rows or columns of a dimension with these axes, one or several parts; 0 for a dimension that is never cut."""
    return sum(part_width(part, sizes) for part in axes.split("+"))


def part_width(part: str, sizes: Sizes) -> int:
    """Rows or columns of one part of a dimension; 0 for a dimension that is never cut."""
    return sizes.width(part)


def kept_rows(axes: str, kept: Kept, position: int | None, before: Sizes) -> list[int] | None:
    """Rows or columns of the parent's tensor that a dimension with these axes keeps, ascending; None if it keeps all of them.

    Args:
        axes: The dimension's word in the axis map.
        kept: What stays.
        position: Number of the layer among the kept ones; None outside the layers.
        before: Sizes of the parent.
    """
    parts = axes.split("+")
    chosen = [kept.of(part, position) for part in parts]
    if all(indices is None for indices in chosen):
        return None
    starts = itertools.accumulate((part_width(part, before) for part in parts), initial=0)
    return [start + index for part, indices, start in zip(parts, chosen, starts) for index in part_rows(part, indices, before)]


def part_rows(part: str, indices: list[int] | None, sizes: Sizes) -> Sequence[int]:
    """Rows or columns of the kept indices of one part; all of them if nothing is cut."""
    if indices is None:
        return range(part_width(part, sizes))
    if part not in ("heads", "kv_heads"):
        return indices
    return [head * sizes.head_dim + channel for head in indices for channel in range(sizes.head_dim)]
