"""The size along one axis that leaves a share of the parameters of the decoder layers."""

from pathlib import Path

from decoct.models.axis_map import Axis
from decoct.models.common.errors import UserError
from decoct.models.family_map import family_of
from decoct.models.folder.loading import load_config, meta_model
from decoct.models.pruning.structured import formula
from decoct.models.sizes import sizes_of, target_sizes

NEAR = 0.05
"""Most that a shape may differ from the share."""
UNITS = {"ffn": 16, "hidden": 8}
"""Axis -> what its sizes are multiples of; 1 for the others."""


def shape_for(folder: Path, axis: Axis, share: float) -> int | None:
    """Number to keep along ``axis`` so that the decoder layers keep about ``share`` of their parameters; None if no number does."""
    config = load_config(str(folder))
    family = family_of(config)
    before = sizes_of(config, family)
    shapes = {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters() if family.place(name)[0] == 0}
    whole = formula(family, shapes, before)
    found: dict[int, float] = {}
    unit = UNITS.get(axis, 1)
    for number in range(unit, before.of(axis), unit):
        try:
            after = target_sizes(config, family, {axis: number})
        except UserError:
            # no model of the family has this size
            continue
        found[number] = abs(formula(family, shapes, after) / whole - share)
    best = min(found, key=found.__getitem__, default=None)
    return best if best is not None and found[best] <= NEAR else None
