"""Settings of losses on what is inside the teacher: hidden states and relations between tokens. Plain data, importable without torch."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from .. import Bounds, Count, check_fields

HiddenLoss = Literal["cosine", "mse", "nmse"]
LayerMap = Literal["even", "kept", "last"]
Relation = Literal["qq", "kk", "vv"]
Layer = Annotated[int, Bounds(ge=0, why="layers are counted from 0")]
Pairs = tuple[tuple[Layer, Layer], ...]
"""(student's layer, teacher's layer), counted from 0."""
Weight = Annotated[float, Bounds(gt=0, why="leave the section out to train without it")]


@dataclass(frozen=True, kw_only=True)
class HiddenSettings:
    """Loss between the hidden states that decoder layers of student and teacher return."""

    weight: Weight
    """Factor on this term, which is added to the loss on predictions."""
    loss: HiddenLoss = "cosine"
    """cosine = 1 - cosine of the two vectors; mse = mean over channels of the squared difference; nmse = squared length of the difference,
    divided by that of the teacher's vector."""
    layers: LayerMap | Pairs = "even"
    """Pairs of layers, whose terms are averaged: even = every layer of the student, spread evenly over the teacher's; kept = every layer of
    the student with the one of the teacher that it was made of, as decoct.json of the stage's input records it; last = the last two; or a
    list of [student's layer, teacher's layer], counted from 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_pairs(self.layers)


@dataclass(frozen=True, kw_only=True)
class RelationSettings:
    """Loss between attention relations (MiniLM): how similar queries, keys or values of tokens are, as a distribution over tokens."""

    weight: Weight
    """Factor on this term, which is added to the loss on predictions."""
    of: tuple[Relation, ...] = ("qq", "kk", "vv")
    """Relations, whose terms are averaged: between queries (qq), keys (kk) or values (vv)."""
    layers: LayerMap | Pairs = "last"
    """Pairs of layers, as for hidden."""
    heads: Count | None = None
    """Relation heads, into which the vectors of student and teacher are cut, however many attention heads they have. Default: the largest
    number that divides all widths, at most the teacher's query heads."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_pairs(self.layers)
        if not self.of:
            raise ValueError("of=[] names no relation; name some of qq, kk and vv, or leave the section out")
        if twice := next((name for name in self.of if self.of.count(name) > 1), None):
            raise ValueError(f"of={list(self.of)} names {twice} twice")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Terms on what is inside the teacher, added to the loss on its predictions."""

    at_least_one: ClassVar = ("hidden", "relations")

    hidden: HiddenSettings | None = None
    """Loss between hidden states."""
    relations: RelationSettings | None = None
    """Loss between attention relations."""

    def __post_init__(self) -> None:
        if self.hidden is None and self.relations is None:
            raise ValueError("features need 'hidden' or 'relations', such as features: {hidden: {weight: 0.5}}")


def _check_pairs(layers: str | Pairs) -> None:
    """ValueError unless ``layers`` is a word, or pairs in which no layer of the student occurs twice."""
    if isinstance(layers, str):
        if layers not in get_args(LayerMap):
            raise ValueError(
                f"layers={layers!r} is not one of {', '.join(get_args(LayerMap))}, nor a list of pairs such as [[0, 0], [1, 3]]"
            )
        return
    if not layers:
        raise ValueError("layers=[] names no pair; give pairs such as [[0, 0], [1, 3]], or leave the key out")
    students = [student for student, _ in layers]
    if min(min(pair) for pair in layers) < 0:
        raise ValueError(f"layers={[list(pair) for pair in layers]} has a negative number; layers are counted from 0")
    if (twice := next((layer for layer in students if students.count(layer) > 1), None)) is not None:
        raise ValueError(f"layers={[list(pair) for pair in layers]} gives layer {twice} of the student two layers of the teacher")
