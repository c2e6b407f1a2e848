"""The inverse of a cut: a model of the parent's shape that computes what the cut model computes.

Every tensor lies where the record of kept indices says that it is from, and all else is zero, which is the parent with masks. So the record
can be tried without the parent, and also for a model that was trained after the cut.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..family_map import family_of
from ..kept_layers import grown_config
from ..sizes import Sizes, sizes_of
from .kept import Kept
from .structured import dimension_width, kept_rows, norm_factors, scaled_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..axis_map import Family


@torch.no_grad()
def expand(student: "PreTrainedModel", kept: Kept, before: Sizes) -> "PreTrainedModel":
    """The model of the parent's sizes whose removed parts are zero, and whose kept parts are the student's.

    Norms have the student's weights divided by ``norm_factors``, and an epsilon that counts the zeros, so that both models compute the
    same but for rounding. A layer that the student does not have hands its input on, since all of its tensors are zero.

    Args:
        student: A model that was cut; not changed.
        kept: What the cut kept.
        before: Sizes of the parent.

    Returns:
        The model in the student's dtype and on its device, in eval mode.

    Raises:
        UserError: the family has no map, LayerNorms lost channels, or a tensor is not as wide as the kept indices say.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    family, after = family_of(student), sizes_of(student.config, family_of(student))
    if not expandable(family, kept):
        raise UserError(f"a cut of the hidden channels of a {family.name} cannot be undone: a LayerNorm's mean is over fewer channels")
    with torch.device(student.device), no_init_weights():
        config = grown_config(student.config, family, before, kept.layers)
        parent: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=student.dtype)
    # a part of the initialisation that was left out
    parent.tie_weights()
    factors = norm_factors(parent, before, after)
    for parameter in parent.parameters():
        parameter.zero_()
    for name, value in student.named_parameters():
        origin = family.source(name, kept.layers)
        owner = origin.rpartition(".")[0]
        if (factor := factors.get(owner)) is not None:
            value = value / factor if owner == family.embedding else scaled_norm(value, 1 / factor, family.norm_offset)
        parent.get_parameter(origin).copy_(_spread(value, family, origin, kept, family.place(name)[0], before))
    _scale_epsilons(parent, family, before, after)
    return parent.eval()


def expandable(family: "Family", kept: Kept) -> bool:
    """Whether masks in the parent can be what the cut is: not where LayerNorms lost channels of their mean."""
    return not (family.layer_norm and kept.hidden is not None)


def _spread(tensor: Tensor, family: "Family", name: str, kept: Kept, position: int | None, before: Sizes) -> Tensor:
    """A tensor of the student in the parent's shape, zero elsewhere; ``name`` is the parent's."""
    for dim, axes in enumerate(family.entry(name) or ()):
        if (rows := kept_rows(axes, kept, position, before)) is None:
            continue
        if len(rows) != tensor.shape[dim]:
            raise UserError(
                f"{name} has {tensor.shape[dim]} rows or columns along {axes!r}, and decoct.json keeps {len(rows)}; make the folder again"
            )
        shape = list(tensor.shape)
        shape[dim] = dimension_width(axes, before)
        tensor = tensor.new_zeros(shape).index_copy(dim, torch.tensor(rows, device=tensor.device), tensor)
    return tensor


def _scale_epsilons(parent: "PreTrainedModel", family: "Family", before: Sizes, after: Sizes) -> None:
    """Makes the epsilon of each RMSNorm over zeros as small, beside its smaller mean, as it is in the student."""
    if family.layer_norm:
        return
    norms = {
        f"{family.layers_path}.{index}.{norm}": family.layer[f"{norm}.weight"][0]
        for index in range(before.layers)
        for norm in family.rms_norms
    }
    norms[family.final_norm] = "hidden"
    for name, axis in norms.items():
        module: Any = parent.get_submodule(name)
        # transformers has two names for it
        field = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
        setattr(module, field, getattr(module, field) * dimension_width(axis, after) / dimension_width(axis, before))
