"""decoct: distil, prune, quantize, export and report large language models. Importing it costs nothing.

It hands on runs and verbs as functions (``decoct.run``, ``decoct.distill``; docs/python-api.md) and the errors that they raise. Besides
them stands here what every sub-package shares: names that a package hands on lazily, and what a field of a settings dataclass takes.

A new setting states what it takes at its field and nowhere else: its type, and the bounds of a number as metadata of the type,

    keep: Annotated[float, Bounds(gt=0, lt=1, why="it is the share of the weights that stays")]

with its description in the string below the field. The dataclass calls ``check_fields(self)`` in ``__post_init__``. Recipes, their
messages, the JSON Schema and the reference of recipe keys all read the field. A rule about several fields of one dataclass belongs in
its ``__post_init__``; a rule about several sections or stages belongs in ``configs/checks.py``.
"""

import ast
import importlib
import keyword
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from .launch.functions.run import run as run
    from .launch.functions.stages import distill as distill
    from .launch.functions.stages import evaluate as evaluate
    from .launch.functions.stages import export as export
    from .launch.functions.stages import prune as prune
    from .launch.functions.stages import qat as qat
    from .launch.functions.stages import quantize as quantize
    from .models.common.errors import DecoctError as DecoctError
    from .models.common.errors import GateFailed as GateFailed
    from .models.common.errors import MemoryFullError as MemoryFullError
    from .models.common.errors import NonFiniteError as NonFiniteError
    from .models.common.errors import UserError as UserError

__version__ = "0.1.0"


def lazy_names(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that hands on names of its modules (PEP 562).

    The names are those that the package's ``__init__.py`` imports under ``if TYPE_CHECKING:``. A type checker reads them there; at run
    time each is imported when it is first asked for. So a package costs nothing to import, and ``decoct.qat.spec`` needs no torch.
    """

    def places() -> dict[str, str]:
        tree = ast.parse(Path(str(sys.modules[package].__file__)).read_text(encoding="utf-8"))
        blocks = (node for node in tree.body if isinstance(node, ast.If))
        imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
        return {alias.name: f"{package}.{node.module}" for node in imports for alias in node.names}

    def get(name: str) -> object:
        place = None if name.startswith("__") else places().get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(place), name)
        # a variable of the package from now on, so that Python asks here once per name
        vars(sys.modules[package])[name] = found
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places()})

    return get, names


_handed_on, __dir__ = lazy_names(__name__)


def __getattr__(name: str) -> object:
    # qat is a package too, and its name stays the package's: the package itself can be called (``CallablePackage``)
    return importlib.import_module(f"{__name__}.qat") if name == "qat" else _handed_on(name)


class CallablePackage(types.ModuleType):
    """A sub-package that is also the function of its name: ``decoct.qat(model, ...)`` beside ``from decoct.qat import QuantSpec``."""

    def __call__(self, *given: Any, **settings: Any) -> Any:
        """Call the function; see ``decoct.launch.functions.stages``."""
        functions = importlib.import_module(f"{__name__}.launch.functions.stages")
        return getattr(functions, self.__name__.rpartition(".")[2])(*given, **settings)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The numbers that a setting takes, as metadata of its type: ``Annotated[int, Bounds(ge=1)]``. A bound that is None is open."""

    ge: float | None = None
    """The smallest number."""
    gt: float | None = None
    """All numbers are greater than this."""
    le: float | None = None
    """The largest number."""
    lt: float | None = None
    """All numbers are less than this."""
    why: str = ""
    """What a message says after the bounds: the reason, or what to use instead."""

    def allow(self, value: float) -> bool:
        """Whether ``value`` lies within the bounds; NaN never does."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def words(self) -> str:
        """The bounds in words, such as 'at least 0 and less than 1'."""
        named = (("at least", self.ge), ("greater than", self.gt), ("at most", self.le), ("less than", self.lt))
        return " and ".join(f"{word} {limit:,}" for word, limit in named if limit is not None)

    def demand(self) -> str:
        """The end of a message about a number that is not allowed: the bounds and the reason."""
        return f"must be {self.words()}" + (f"; {self.why}" if self.why else "")


@dataclass(frozen=True)
class WrittenAs:
    """Metadata of a type: recipes write a value in the form of another dataclass, whose ``settled()`` returns the value."""

    form: type
    """That dataclass: the reader of recipes, their schema and their reference see it in place of the type."""


Count = Annotated[int, Bounds(ge=1)]
"""A number of things."""


def recipe_key(field: str) -> str:
    """The key of a recipe for a field: without the underscore behind a word that Python keeps for itself (``from_``)."""
    return field.removesuffix("_")


def field_of(key: str) -> str:
    """The field of a settings dataclass for a key of a recipe: the other way round."""
    return f"{key}_" if keyword.iskeyword(key) else key


@cache
def types_of(settings: type) -> dict[str, Any]:
    """Key -> type of a settings dataclass, metadata included, in the order of its fields."""
    hints = get_type_hints(settings, include_extras=True)
    return {recipe_key(entry.name): hints[entry.name] for entry in fields(settings)}


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; without metadata."""
    return tuple(_bare(option) if get_origin(option) is Annotated else option for option in _members(annotation))


def _bare(annotated: Any) -> Any:
    """The type without its metadata, or the form in which recipes write it."""
    plain, *extras = get_args(annotated)
    return next((extra.form for extra in extras if isinstance(extra, WrittenAs)), plain)


def bounds_of(annotation: Any) -> Bounds:
    """The bounds of the numbers that a type allows; open ones where it names none."""
    found = (get_args(option)[1:] for option in _members(annotation) if get_origin(option) is Annotated)
    return next((extra for extras in found for extra in extras if isinstance(extra, Bounds)), Bounds())


def choices(annotation: Any) -> tuple[str, ...]:
    """The words that a type allows by name."""
    return tuple(word for option in alternatives(annotation) if get_origin(option) is Literal for word in get_args(option))


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What a field of a settings dataclass takes, worked out of its type once."""

    many: bool
    """The field is a tuple, and the rule is for each of its items."""
    words: tuple[str, ...]
    none: bool
    truth: bool
    whole: bool
    """Whole numbers."""
    fractions: bool
    """All numbers."""
    bounds: Bounds

    def fault(self, value: Any) -> str | None:
        """What is wrong with ``value``; None if nothing is."""
        if value in self.words or (value is None and self.none):
            return None
        if self.truth:
            return None if isinstance(value, bool) else "is not a truth value; use true or false"
        if not (self.whole or self.fractions):
            return f"is not one of {', '.join(self.words)}"
        if isinstance(value, bool) or not isinstance(value, (int, float) if self.fractions else int):
            number = "number" if self.fractions else "whole number"
            return f"is neither a {number} nor one of {', '.join(self.words)}" if self.words else f"is not a {number}"
        return None if self.bounds.allow(value) else self.bounds.demand()


@cache
def _rules(settings: type) -> dict[str, _Rule]:
    """The rules of the fields that allow nothing but numbers, truth values and choices."""
    rules = {}
    for name, annotation in types_of(settings).items():
        item = next((get_args(option)[0] for option in alternatives(annotation) if get_origin(option) is tuple), None)
        allowed = alternatives(annotation if item is None else item)
        options = [option for option in allowed if option is not type(None)]
        if all(option in (int, float, bool) or get_origin(option) is Literal for option in options):
            rules[name] = _Rule(
                many=item is not None,
                words=choices(annotation if item is None else item),
                none=type(None) in (*allowed, *alternatives(annotation)),
                truth=bool in options,
                whole=int in options,
                fractions=float in options,
                bounds=bounds_of(annotation if item is None else item),
            )
    return rules


def check_fields(settings: Any) -> None:
    """Check numbers, truth values and choices of a settings dataclass against the types of its fields.

    Raises:
        ValueError: the first field whose value is not allowed, as ``name=value``, what it must be, and why.
    """
    # torch.compile cannot trace the walk over types; values of a spec made in a compiled forward pass are not checked
    if "torch" in sys.modules and sys.modules["torch"].compiler.is_compiling():
        return
    for name, rule in _rules(type(settings)).items():
        value = getattr(settings, field_of(name))
        for item in value if rule.many and isinstance(value, tuple) else (value,):
            if fault := rule.fault(item):
                raise ValueError(f"{name}={item!r} {fault}")
