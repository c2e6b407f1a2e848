"""Which layer of the teacher each layer of a student is compared with. It imports no torch, because plans ask for it."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from .common.errors import UserError
from .common.terminal_text import counted
from .pruning.kept_record import ROOT

LayerPairs = list[tuple[int, int]]
"""(student's layer, teacher's layer), counted from 0."""


def layer_pairs(layers: str | Sequence[tuple[int, int]], student: int, teacher: int, kept: Sequence[int] | None, key: str) -> LayerPairs:
    """The pairs that a setting names.

    Args:
        layers: ``even``, ``kept``, ``last``, or the pairs themselves.
        student: Layers of the student; teacher: layers of the teacher.
        kept: The layers of the teacher that the student was made of; None = unknown.
        key: Key of the setting, for messages.

    Returns:
        ``even`` maps layer i of S to round((i + 1) T / S) - 1, halves to even, so that the last layers meet (TinyBERT's uniform map,
        arXiv 1909.10351, where T is a multiple of S).

    Raises:
        UserError: a layer does not exist, or it is not known of which layers the student was made.
    """
    if layers == "last":
        return [(student - 1, teacher - 1)]
    if layers == "even":
        # exact arithmetic: the same on every machine
        return [(index, max(1, round(Fraction((index + 1) * teacher, student))) - 1) for index in range(student)]
    if layers == "kept":
        if kept is None or len(kept) != student or max(kept, default=0) >= teacher:
            raise UserError(
                f"{key}: kept, but the stage's input does not record of which of the teacher's {counted(teacher, 'layer')} its "
                f"{counted(student, 'layer')} were made (decoct.json of a student by student.keep, or of a prune stage that cut layers); "
                "use even, or name the pairs: [[0, 0], [1, 3]]"
            )
        return list(enumerate(kept))
    named: LayerPairs = [(ours, theirs) for ours, theirs in layers]  # pyright: ignore[reportAssignmentType] - words are dealt with above
    for ours, theirs in named:
        if ours >= student or theirs >= teacher:
            raise UserError(
                f"{key}: the pair [{ours}, {theirs}] does not exist: the student has {counted(student, 'layer')} and the teacher "
                f"{counted(teacher, 'layer')}, counted from 0"
            )
    return named


def recorded_layers(record: Mapping[str, Any], student: int, teacher: int) -> list[int] | None:
    """The teacher's layers that a folder was made of, through all cuts, from its decoct.json; None if that is not known.

    A folder of which no layer was cut, and which has as many as the teacher, has all of them.
    """
    # folders of versions that recorded the parent alone have no root
    root: Any = record.get(ROOT) or {"shape": record.get("parent_shape"), "kept": record.get("kept")}
    try:
        kept, of = root["kept"]["layers"], root["shape"]["layers"]
    except (TypeError, KeyError):
        return list(range(teacher)) if student == teacher else None
    known = isinstance(kept, list) and kept and all(isinstance(index, int) for index in kept)
    return kept if known and of == teacher else None
