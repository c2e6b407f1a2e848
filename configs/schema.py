"""From a section's tree to its settings dataclass, or to readable problems: the one place where pydantic works.

A walk along the dataclass finds unknown keys (with the nearest valid one) and gives every scalar its meaning; pydantic then
checks types and required keys strictly, builds the frozen dataclasses, and so runs their own checks.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..models.settings import CacheSettings
from ..trainer.settings import DataSettings, LoggerSettings, TrainerSettings, TrainingBlock
from .foreign_names import meant_by
from .nodes import KeyPath, Listing, Mapping, Node, Scalar, is_null
from .problems import Problems, did_you_mean, nearest
from .ranges import out_of_range
from .scalars import alternatives, choices, describe, parse_number, read_scalar

Settings = TypeVar("Settings")

_PASSWORD = re.compile(r"://[^/\s]*@")
# Sections that may be written as one word: `logger: wandb` is `logger: {kind: wandb}`, `cache: top_k` is `cache: {mode: top_k}`.
SHORT_FORMS: dict[type, str] = {LoggerSettings: "kind", CacheSettings: "mode"}
# Where a key lives that someone put into the wrong section.
_SECTIONS: dict[str, type] = {"data": DataSettings, "trainer": TrainerSettings, "logger": LoggerSettings}


@cache
def types_of(settings: type) -> dict[str, Any]:
    """Key -> type of a settings dataclass, in the order of its fields."""
    hints = get_type_hints(settings)
    return {entry.name: hints[entry.name] for entry in fields(settings)}


def read_settings(node: Node, settings: type[Settings], path: KeyPath, problems: Problems, *, also: Sequence[str] = ()) -> Settings | None:
    """The validated dataclass that ``node`` describes; None when something is wrong, which ``problems`` then tells.

    Args:
        path: where ``node`` stands in the recipe.
        also: keys that are valid here and read elsewhere, for the list of valid keys.
    """
    plain = _Walk(problems, {path: tuple(also)}).value(node, settings, path)
    if not isinstance(plain, dict):
        problems.add(path, f"wants {describe(settings)}; got {shown(node)}")
        return None
    built = _validate(plain, settings, path, problems)
    return built if built is not None and not any(problems.touches((*path, key)) for key in _keys(node)) else None


def _keys(node: Node) -> Sequence[str]:
    return tuple(node.entries) if isinstance(node, Mapping) else ()


class _Walk:
    """Reads plain data out of a tree, guided by types."""

    def __init__(self, problems: Problems, also: dict[KeyPath, tuple[str, ...]]) -> None:
        self._problems = problems
        self._also = also

    def value(self, node: Node, annotation: Any, path: KeyPath) -> Any:
        """Plain data for a key of type ``annotation``."""
        section = next((option for option in alternatives(annotation) if is_dataclass(option)), None)
        if isinstance(node, Scalar):
            return self._scalar(node, annotation, section, path)
        if isinstance(node, Listing):
            return self._listing(node, annotation, path)
        if isinstance(section, type):
            return self._section(node, section, path)
        inner = _value_type(annotation)
        return {key: self.value(entry.node, inner, (*path, key)) for key, entry in node.entries.items()}

    def _scalar(self, node: Scalar, annotation: Any, section: Any, path: KeyPath) -> Any:
        if section in SHORT_FORMS and not is_null(node):
            word = SHORT_FORMS[section]
            return {word: self._scalar(node, types_of(section)[word], None, path)}
        item = _item_type(annotation, 0)
        if item is not Any and _is_open_list(annotation) and not is_null(node):
            return [self._scalar(node, item, None, path)]
        found = read_scalar(node, annotation)
        if isinstance(found, str) and not found.isprintable():
            self._problems.add(path, "holds characters that cannot be printed; write plain text on one line")
            return ""
        if isinstance(found, str) and _PASSWORD.search(found):
            # not shown: this would be printed, logged and written into the run folder
            self._problems.add(path, "holds an address with a name or password in it (://...@); give the bare address")
            return ""
        return found

    def _listing(self, node: Listing, annotation: Any, path: KeyPath) -> list[Any]:
        return [self.value(item, _item_type(annotation, index), (*path, index)) for index, item in enumerate(node.items)]

    def _section(self, node: Mapping, section: type, path: KeyPath) -> dict[str, Any]:
        known = types_of(section)
        found = {}
        for key, entry in node.entries.items():
            if key not in known:
                valid = (*self._also.get(path, ()), *known)
                self._problems.add((*path, key), unknown_key(key, valid))
                self._problems.excuse((*path, nearest(key, valid) or key))
                continue
            # A key without a value keeps its default, so `stages: - export:` and `tokens:` mean what they look like.
            if not is_null(entry.node):
                found[key] = self.value(entry.node, known[key], (*path, key))
                if fault := out_of_range(section, key, found[key]):
                    self._problems.add((*path, key), fault)
        return found


def _list_types(annotation: Any) -> tuple[Any, ...]:
    """Arguments of the tuple type that ``annotation`` allows; () when it allows none."""
    return next((get_args(option) for option in alternatives(annotation) if get_origin(option) is tuple), ())


def _is_open_list(annotation: Any) -> bool:
    return _list_types(annotation)[-1:] == (Ellipsis,)


def _item_type(annotation: Any, index: int) -> Any:
    """Type of the item at ``index`` of a list; Any where the type says nothing."""
    inner = _list_types(annotation)
    if not inner:
        return Any
    return inner[0] if _is_open_list(annotation) else inner[min(index, len(inner) - 1)]


def _value_type(annotation: Any) -> Any:
    """Type of the values of a dict; Any where the type says nothing."""
    return next((get_args(option)[1] for option in alternatives(annotation) if get_origin(option) is dict and get_args(option)), Any)


def unknown_key(key: str, valid: Sequence[str]) -> str:
    """The message for a key that does not exist here: what it is called or where it belongs, or the nearest, and all valid ones."""
    foreign = meant_by(key)
    if foreign:
        return f"unknown key: {foreign}; valid here: {', '.join(valid)}"
    hint = did_you_mean(key, valid)
    if not hint:
        homes = [f"it belongs at {name}.{key}" for name, section in _SECTIONS.items() if key in types_of(section)]
        if key in types_of(TrainingBlock):
            homes.append("it belongs to a stage that trains")
        hint = f", {homes[0]};" if homes else ";"
    return f"unknown key{hint} valid here: {', '.join(valid)}"


@cache
def _adapter(settings: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(settings)


def _validate(plain: dict[str, Any], settings: type[Settings], path: KeyPath, problems: Problems) -> Settings | None:
    """Strict validation. The detour over JSON is pydantic's strict mode in which lists are tuples and dicts are dataclasses."""
    from pydantic import ValidationError

    try:
        return _adapter(settings).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            _tell(fault, _real_keys(plain, fault["loc"]), plain, settings, path, problems)
    return None


def _real_keys(plain: Any, location: Sequence[Any]) -> KeyPath:
    """The part of a pydantic location that is a key path; what follows names a member of a union or a missing key."""
    keys: list[str | int] = []
    for part in location:
        inside = part in plain if isinstance(plain, dict) else isinstance(plain, list) and isinstance(part, int) and part < len(plain)
        if not inside:
            break
        keys.append(part)
        plain = plain[part]
    return tuple(keys)


def _tell(fault: Any, keys: KeyPath, plain: Any, settings: type, path: KeyPath, problems: Problems) -> None:
    """Turn one of pydantic's errors into a problem."""
    at = (*path, *keys)
    annotation: Any = settings
    value: Any = plain
    for key in keys:
        annotation, value = _inner_type(annotation, key), value[key]
    if fault["type"] == "missing" and isinstance(value, dict):
        name = str(fault["loc"][-1])
        if not problems.excused((*at, name)):
            problems.add(at, f"needs the key '{name}': {describe(_inner_type(annotation, name))}")
    elif problems.touches(at):
        # Told already (unions fail once per member), or the consequence of a misspelt key below.
        return
    elif fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        # 'bits=9 is outside 2..8' is told at the line of bits
        named = message.partition("=")[0]
        place = (*at, named) if isinstance(value, dict) and named in value else at
        if place == at or not problems.touches(place):
            problems.add(place, message)
    else:
        problems.add(at, f"wants {describe(annotation)}; got {shown(value)}{_hint(value, annotation)}")


def _hint(value: Any, annotation: Any) -> str:
    """What a value that does not fit was probably meant to be."""
    if not isinstance(value, str):
        return ""
    numbers = {int, float} & set(alternatives(annotation))
    if numbers and value[:1].isdigit() and parse_number(value) is None:
        return "; suffixes are k, M and B (powers of 1000)"
    return did_you_mean(value, choices(annotation))


def _inner_type(annotation: Any, key: str | int) -> Any:
    """The type of what stands under ``key``."""
    section = next((option for option in alternatives(annotation) if is_dataclass(option)), None)
    if isinstance(section, type):
        return types_of(section).get(str(key), Any)
    return _item_type(annotation, key) if isinstance(key, int) else _value_type(annotation)


def shown(value: Any) -> str:
    """A value as a message quotes it, shortened."""
    if isinstance(value, Mapping | dict):
        return "a section of keys"
    if isinstance(value, Listing | list):
        return f"a list of {len(value.items if isinstance(value, Listing) else value)}"
    if isinstance(value, Scalar):
        value = value.value
    if value is None or value == "":
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
