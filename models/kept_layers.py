"""Which layers of a teacher a student keeps, and the config of a cut model. It imports no torch, because plans ask for it."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .axis_map import Family
from .common.errors import UserError
from .common.terminal_text import counted
from .family_map import family_of
from .settings import allowed_layers
from .sizes import Sizes, fixed_depth, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PER_LAYER = ("layer_types", "no_rope_layers")
"""Config fields with one entry per layer."""


def kept_layers(total: int, keep: int | Sequence[int]) -> list[int]:
    """Indices of ``keep`` of ``total`` layers: ``round(linspace(0, total - 1, keep))``, so first and last are among them.

    Exact arithmetic, halves to even: the indices are distinct and the same on every machine. A sequence names the indices, ascending.

    Raises:
        UserError: ``keep`` is below 2 (below 1 for a model of one layer) or above ``total``, or one of its indices does not exist.
    """
    if not isinstance(keep, int):
        if outside := [index for index in keep if index >= total]:
            raise UserError(
                f"student.keep.layers={_shown(keep)}: layer {outside[0]} does not exist in a teacher of {counted(total, 'layer')}, counted "
                f"from 0; the last is {total - 1}"
            )
        return list(keep)
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


def kept_config(config: "PreTrainedConfig", layers: int | Sequence[int]) -> tuple["PreTrainedConfig", list[int]]:
    """(config of a student made of ``layers`` of a teacher with this config, as for ``kept_layers``; indices of those layers).

    Raises:
        UserError: as ``student_by_keeping``.
    """
    family = family_of(config)
    kept = kept_layers(getattr(config, family.depth_field), layers)
    if getattr(config, "is_heterogeneous", False):
        raise UserError("the teacher's config has per_layer_config (layers of different shapes); student.keep needs equal layers")
    if len(kept) < getattr(config, family.depth_field) and (reason := fixed_depth(config)):
        raise UserError(f"student.keep.layers={_shown(layers)}: {reason}; use student.path or student.config")
    return cut_config(config, family, replace(sizes_of(config, family), layers=len(kept)), kept), kept


def _shown(layers: int | Sequence[int]) -> str:
    return str(layers if isinstance(layers, int) else list(layers))


def cut_config(source: "PreTrainedConfig", family: Family, sizes: Sizes, kept: Sequence[int]) -> "PreTrainedConfig":
    """The config of a model of ``sizes`` with the layers ``kept`` of the model of ``source``, which is not changed.

    Besides the sizes only that changes which follows from them: lists with one entry per layer, ``max_window_layers``, and an explicit
    ``head_dim`` where a width changes.
    """
    config: Any = copy.deepcopy(source)
    before = sizes_of(source, family)
    for name in _PER_LAYER:
        # full and sliding attention alternate, and positions are left out in some layers: each kept layer keeps its kind
        if (entries := getattr(config, name, None)) is not None and len(entries) == before.layers:
            setattr(config, name, [entries[index] for index in kept])
    if getattr(config, "max_window_layers", None) is not None:
        # layers from this index on use the sliding window, those below it attend to all tokens
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    for axis, field in family.fields.items():
        if sizes.of(axis) != before.of(axis):
            setattr(config, field, sizes.of(axis))
    if family.own_head_dim and (before.ffn, before.heads, before.hidden) != (sizes.ffn, sizes.heads, sizes.hidden):
        # explicit, because a config without it derives another number from the new widths without any error
        config.head_dim = sizes.head_dim
    if getattr(config, "word_embed_proj_dim", None) == before.hidden:
        config.word_embed_proj_dim = sizes.hidden
    if before.hidden != sizes.hidden and family.name == "gpt2" and sizes.ffn == before.ffn:
        # without n_inner it would follow the hidden size
        config.n_inner = sizes.ffn
    return config


def grown_config(source: "PreTrainedConfig", family: Family, sizes: Sizes, kept: Sequence[int]) -> "PreTrainedConfig":
    """The config of a model of ``sizes`` of which the model of ``source`` has the layers ``kept``: what ``cut_config`` undoes.

    A layer that ``source`` does not have is of the kind of its first one, because no config says what the kind was.
    """
    config: Any = copy.deepcopy(source)
    for name in _PER_LAYER:
        if (entries := getattr(config, name, None)) is not None and len(entries) == len(kept):
            known = dict(zip(kept, entries, strict=True))
            setattr(config, name, [known.get(index, entries[0]) for index in range(sizes.layers)])
    for axis, field in family.fields.items():
        setattr(config, field, sizes.of(axis))
    if family.own_head_dim:
        config.head_dim = sizes.head_dim
    return config
