"""Which layers of a teacher a student keeps, and its config. It imports no torch, because plans ask for it."""

import copy
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .common.errors import UserError
from .common.terminal_text import counted
from .families import Family, family_of
from .settings import allowed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def kept_layers(total: int, keep: int) -> list[int]:
    """Indices of ``keep`` of ``total`` layers: ``round(linspace(0, total - 1, keep))``, so first and last are among them.

    Exact arithmetic, halves to even: the indices are distinct and the same on every machine.

    Raises:
        UserError: ``keep`` is below 2 (below 1 for a model of one layer) or above ``total``.
    """
    least = min(2, total)
    if not least <= keep <= total:
        raise UserError(
            f"student.keep.layers={keep} cannot be cut from a teacher of {counted(total, 'layer')}; {allowed_layers(total)} "
            "(first and last layer are always kept)"
        )
    if total == 1:
        return [0]
    # Fraction: linspace in floating point could round a half either way
    return [round(Fraction(index * (total - 1), keep - 1)) for index in range(keep)]


def kept_config(config: "PreTrainedConfig", layers: int) -> tuple["PreTrainedConfig", list[int]]:
    """(config of a student made of ``layers`` layers of a teacher with this config, indices of those layers).

    Raises:
        UserError: as ``student_by_keeping``.
    """
    family = family_of(config)
    kept = kept_layers(getattr(config, family.depth_field), layers)
    return _shallow_config(config, family, kept), kept


def _shallow_config(source: "PreTrainedConfig", family: Family, kept: list[int]) -> "PreTrainedConfig":
    """The teacher's config with fewer layers, with consistent depth, ``layer_types`` and ``max_window_layers``."""
    config: Any = copy.deepcopy(source)
    if getattr(config, "is_heterogeneous", False):
        raise UserError("the teacher's config has per_layer_config (layers of different shapes); student.keep needs equal layers")
    if getattr(config, "layer_types", None):
        # full and sliding attention alternate: each kept layer keeps its kind
        config.layer_types = [config.layer_types[index] for index in kept]
    if getattr(config, "max_window_layers", None) is not None:
        # layers from this index on use the sliding window, those below it attend to all tokens
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    setattr(config, family.depth_field, len(kept))
    return config
