"""What a field of a settings dataclass takes stands at the field, and holds for recipes and for Python alike."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from decoct import Bounds, Count, alternatives, bounds_of, check_fields, choices, field_of, types_of
from decoct.configs.reading import SECTIONS
from decoct.losses.settings_features import FeatureSettings, HiddenSettings, RelationSettings
from decoct.models.settings import KeepSettings, ServedSettings, StudentSettings, TeacherSettings
from decoct.qat.scheme import SpecChange
from decoct.qat.transforms.settings import TransformSettings
from decoct.trainer.settings import DataSettings
from decoct.trainer.settings_generation import GenerateSettings
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings, StructuredSettings
from decoct.trainer.settings_sparsity import MovementSettings, SparseGptSettings, WandaSettings
from decoct.trainer.settings_watching import EarlyStoppingSettings
from decoct.trainer.stages.registry import STAGE_KINDS

LEAST: dict[type, dict[str, Any]] = {
    GenerateSettings: {"tokens": 1},
    DataSettings: {"builtin": "python-stdlib"},
    TeacherSettings: {"path": "a"},
    StudentSettings: {"path": "a"},
    ServedSettings: {"url": "http://host/v1", "model": "m"},
    KeepSettings: {"layers": 2},
    HiddenSettings: {"weight": 1.0},
    RelationSettings: {"weight": 1.0},
    FeatureSettings: {"hidden": HiddenSettings(weight=1.0)},
    StructuredSettings: {"ffn": 8, "layers": 2},
    **{method: {"keep": 0.5} for method in (MagnitudeSettings, WandaSettings, SparseGptSettings, MovementSettings)},
    EarlyStoppingSettings: {"patience": 1},
    PruneSettings: {"structured": StructuredSettings(ffn=8)},
    SpecChange: {"kind": "int"},
    TransformSettings: {"method": "smoothquant"},
}
"""What each dataclass needs to be made at all."""


def settings_classes() -> Iterator[type]:
    """Every dataclass that a recipe is made of."""
    found: list[type] = [*SECTIONS.values(), *(kind.settings for kind in STAGE_KINDS.values())]
    for settings in found:
        yield settings
        for annotation in types_of(settings).values():
            for option in alternatives(annotation):
                inner = get_args(option)[1:] if get_origin(option) is dict else (option,)
                found += [one for one in inner if isinstance(one, type) and is_dataclass(one) and one not in found]


def refused() -> Iterator[tuple[type, str, Any]]:
    """(dataclass, field, a value just outside its bounds or choices)."""
    for settings in settings_classes():
        for name, annotation in types_of(settings).items():
            several = next((get_args(option) for option in alternatives(annotation) if get_origin(option) is tuple), None)
            kind = several[0] if several else annotation
            bounds = bounds_of(kind)
            wrong: list[Any] = ["no such word"] if choices(kind) else []
            wrong += [limit for limit in (bounds.gt, bounds.lt) if limit is not None]
            wrong += [limit + step for limit, step in ((bounds.ge, -1), (bounds.le, 1)) if limit is not None]
            for value in wrong:
                yield settings, name, (value,) * len(several) if several else value


@pytest.mark.parametrize(
    ("settings", "name", "value"), [pytest.param(*case, id=f"{case[0].__name__}.{case[1]}={case[2]}") for case in refused()]
)
def test_a_value_outside_is_refused_by_the_dataclass(settings: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.* (must be |is not one of |is neither a )"):
        settings(**{**LEAST.get(settings, {}), field_of(name): value})


def test_every_number_of_a_recipe_has_bounds() -> None:
    """A new key's author is asked to think of them."""
    open_ended = [
        f"{settings.__name__}.{name}"
        for settings in settings_classes()
        for name, annotation in types_of(settings).items()
        if {int, float} & set(alternatives(annotation)) and bounds_of(annotation) == Bounds()
    ]
    # a number or a text: their classes check both
    assert open_ended == ["DataSettings.eval_tokens", "WeightSettings.budget"]


@dataclass(frozen=True)
class Example:
    count: Count = 3
    share: Annotated[float, Bounds(ge=0, lt=1, why="it is a share")] | None = None
    size: Count | Literal["all"] = "all"
    pair: tuple[Annotated[float, Bounds(gt=0)], Annotated[float, Bounds(gt=0)]] = (1.0, 2.0)
    on: bool = True
    name: str = "any"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "count=0 must be at least 1"),
        ({"count": 1.0}, "count=1.0 is not a whole number"),
        ({"count": True}, "count=True is not a whole number"),
        ({"count": None}, "count=None is not a whole number"),
        ({"share": 1}, "share=1 must be at least 0 and less than 1; it is a share"),
        ({"share": math.nan}, "share=nan must be at least 0 and less than 1; it is a share"),
        ({"share": "0"}, "share='0' is not a number"),
        ({"size": "none"}, "size='none' is neither a whole number nor one of all"),
        ({"pair": (1.0, 0.0)}, "pair=0.0 must be greater than 0"),
        ({"on": 1}, "on=1 is not a truth value; use true or false"),
    ],
)
def test_the_message_says_what_is_allowed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        check_fields(Example(**given))
    assert str(caught.value) == message


def test_what_is_allowed_passes() -> None:
    check_fields(Example())
    check_fields(Example(count=1, share=0, size=7, name="7"))
    assert [entry.name for entry in fields(Example)] == list(types_of(Example))
