"""Makes the settings dataclass of an imported part: its options become keys of the section that names it.

Recipes are read along dataclasses (``sections.py``), so an option of the user's gets the same checks and messages as a key of decoct's.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .. import alternatives, types_of
from ..losses.settings import LossSettings
from ..losses.settings_own import OwnLossSettings
from ..parts import Kind, Part
from ..trainer.settings import DataSettings
from ..trainer.settings_own import CallbackSettings, OwnCallbackSettings, OwnStageSettings
from ..trainer.settings_text import BlendPart

SLOTS: Mapping[type, tuple[str, Kind]] = {
    LossSettings: ("divergence", "divergence"),
    DataSettings: ("source", "data source"),
    BlendPart: ("source", "data source"),
    CallbackSettings: ("name", "callback"),
}
"""Section -> (the key that may name an imported part, its kind). Stages are named by their kind."""
_GIVEN: Mapping[Kind, tuple[str, ...]] = {
    "divergence": ("student", "teacher"),
    "data source": (),
    "stage": ("context",),
    "callback": (),
}
"""decoct's own arguments of each kind, by position."""
_BASES: Mapping[Kind, type] = {
    "divergence": OwnLossSettings,
    "data source": DataSettings,
    "stage": OwnStageSettings,
    "callback": OwnCallbackSettings,
}
_SLOT_OF = {kind: key for key, kind in SLOTS.values()}
_SIMPLE = (int, float, bool, str, NoneType)
_DIALS = ("beta", "alpha", "balance", "head_mass")
"""Keys of ``loss`` that belong to built-in divergences; an imported one may have an option of that name."""
Option = tuple[str, Any, Field[Any]]
"""(name, type, default) of one option, as ``make_dataclass`` takes it."""


class PartFaultError(ValueError):
    """A target cannot be a part; the message is a predicate of its name: 'must take ...'."""


def options_of(kind: Kind, target: Any, settings: Any) -> list[Option]:
    """The options of a target, from its signature or from ``settings``.

    Raises:
        PartFaultError: the target cannot be called with decoct's arguments, or an option has no type that a recipe can give.
    """
    if not callable(target):
        raise PartFaultError(f"is registered for {target!r:.60}; decorate a function or a class")
    given = _GIVEN[kind]
    try:
        parameters = list(inspect.signature(target).parameters.values())
        # annotations may be text (PEP 563), and bounds are in their metadata: include_extras keeps them
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise PartFaultError(f"has annotations that cannot be read ({type(error).__name__}: {error})") from error
    expected = (*given, *(("settings",) if settings is not None else ()))
    # decoct passes its own arguments by position, so a keyword-only parameter cannot take one
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_position) < len(expected):
        raise PartFaultError(f"must take {' and '.join(expected)} as its first argument{'s' * (len(expected) > 1)}")
    rest = [p for p in parameters if p not in by_position[: len(expected)]]
    # *args and **kwargs have no names that a recipe could check
    for parameter in rest:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PartFaultError(f"takes *{parameter.name}; options need names, types and defaults of their own")
    if settings is not None:
        if not (isinstance(settings, type) and is_dataclass(settings)):
            raise PartFaultError(f"has settings={settings!r}, which is no dataclass")
        if needed := [p.name for p in rest if p.default is p.empty]:
            raise PartFaultError(f"needs {needed[0]} besides its settings; make it a field of {settings.__name__}")
        types = get_type_hints(settings, include_extras=True)
        # fields that a dataclass computes itself (init=False) cannot be given
        found = [(entry.name, types[entry.name], _copied(entry)) for entry in fields(settings) if entry.init]
    else:
        found = [(p.name, _type_of(p, hints), _default(p)) for p in rest]
    for name, annotation, _ in found:
        _check_option(kind, name, annotation)
    return found


def settings_for(part: Part, options: list[Option], base: type | None = None) -> type:
    """The settings dataclass of a part: a subclass of the section's (``base``, if it may stand in several), with the options as fields."""
    slot = _SLOT_OF.get(part.kind)
    # a type of one word: the section of this part names this part and no other
    one_word: Any = Literal[part.name]  # pyright: ignore[reportInvalidTypeForm] - the type of a key that takes this word alone
    default: Any = field(default=part.name)
    named: list[Option] = [] if slot is None else [(slot, one_word, default)]
    made = make_dataclass(
        f"{part.name} ({part.kind})",
        [*named, *options],
        bases=(base or _BASES[part.kind],),
        frozen=True,
        kw_only=True,
        namespace={"part": part, "__doc__": inspect.getdoc(part.target) or f"The {part.kind} {part.name}."},
    )
    made.__module__ = __name__
    return made


@cache
def part_of_blend(made: Any) -> type:
    """The settings of a part of a blend whose text is an imported source; ``made`` are those of the source as the text of a run."""
    options = [(entry.name, types_of(made)[entry.name], _copied(entry)) for entry in fields(made) if entry.name in made.part.options]
    part: Any = settings_for(made.part, options, base=BlendPart)
    part.whole = made
    return part


def _copied(entry: Field[Any]) -> Field[Any]:
    """A field's default in a field of its own: one object cannot be a field of two classes."""
    if entry.default_factory is not MISSING:
        copied: Any = field(default_factory=entry.default_factory)
    else:
        copied = field() if entry.default is MISSING else field(default=entry.default)
    return copied


def _type_of(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    if parameter.name in hints:
        return hints[parameter.name]
    # a default shows the type of an option without annotation
    if type(parameter.default) in (int, float, bool, str):
        return type(parameter.default)
    raise PartFaultError(f"has the option {parameter.name} without a type; annotate it, such as {parameter.name}: float = 1.0")


def _default(parameter: inspect.Parameter) -> Field[Any]:
    if parameter.default is parameter.empty:
        return field()
    if isinstance(parameter.default, dict | list | set):
        # a copy for each use: a list in a signature is one object for all calls, and dataclasses refuse it as a default
        copied: Callable[[], Any] = lambda: parameter.default.copy()  # noqa: E731 - typed, unlike a nested def in one expression
        return field(default_factory=copied)
    return field(default=parameter.default)


def _check_option(kind: Kind, name: str, annotation: Any) -> None:
    # ``name`` of a stage is a key of the recipe's, which it takes out before the settings are read
    taken = {"name"} if kind == "stage" else set[str]()
    if bases := [section for section, (_, of) in SLOTS.items() if of == kind]:
        taken = {entry.name for base in bases for entry in fields(base)} - set(_DIALS if kind == "divergence" else ())
    if name in taken:
        raise PartFaultError(f"has the option {name}, which is a key of the section already; give it another name")
    if wrong := next((option for option in alternatives(annotation) if not _readable(option)), None):
        shown = getattr(wrong, "__name__", None) if get_origin(wrong) is None else str(wrong)
        raise PartFaultError(
            f"has the option {name} of type {shown or wrong}, which a recipe cannot give; use int, float, bool, str, Literal, "
            "tuple[..., ...], dict[str, ...] or None"
        )


def _readable(option: Any) -> bool:
    inner = get_args(option)
    if get_origin(option) is tuple:
        # a bare ``tuple`` says nothing of its items
        return bool(inner) and all(_readable(one) for item in inner if item is not Ellipsis for one in alternatives(item))
    if get_origin(option) is dict:
        return inner[0] is str and (inner[1] is Any or all(map(_readable, alternatives(inner[1]))))
    if get_origin(option) is Literal:
        return all(isinstance(word, str) for word in inner)
    return option in _SIMPLE
