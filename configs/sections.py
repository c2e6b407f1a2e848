"""Turns a section's tree into its settings dataclass, or into readable problems.

One walk along the dataclass finds unknown keys, reads every scalar by the type of its key, checks types, bounds (``decoct.Bounds``) and
required keys, and builds the frozen dataclasses from the inside out, which runs their own checks. The walk knows each value's place, so
every message names the line, the key path, what was given and what is allowed.
"""

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin

from .. import alternatives, bounds_of, choices, field_of, recipe_key, types_of
from ..models.settings import CacheSettings
from ..qat.transforms.settings import TransformSettings
from ..trainer.settings import DataSettings, LoggerSettings, TrainerSettings, TrainingBlock
from ..trainer.settings_own import CallbackSettings
from ..trainer.settings_text import BlendPart
from .foreign_names import meant_by
from .nodes import Entry, KeyPath, Listing, Mapping, Node, Scalar, is_null
from .own_parts import NEEDS_IMPORT, OwnParts
from .own_settings import SLOTS, part_of_blend
from .problems import Problems, did_you_mean, nearest_name
from .scalars import LARGEST_INT, described_type, parse_number, read_scalar

Settings = TypeVar("Settings")

SHORT_FORMS: dict[type, str] = {LoggerSettings: "kind", CacheSettings: "mode", CallbackSettings: "name", TransformSettings: "method"}
"""Sections that can be written as one word: `logger: wandb` is `logger: {kind: wandb}`, `cache: top_k` is `cache: {mode: top_k}`; or as a
list of words where the word's key takes one."""
NO_PARTS = OwnParts()
_PASSWORD = re.compile(r"://[^/\s]*@")
# Sections that are searched for a key that is in the wrong section.
_SECTIONS: dict[str, type] = {"data": DataSettings, "trainer": TrainerSettings, "logger": LoggerSettings}
_WRONG: Any = object()
"""Marks a refused value; the problems have the reason."""


def read_settings(
    node: Node,
    settings: type[Settings],
    path: KeyPath,
    problems: Problems,
    *,
    also: Sequence[str] = (),
    parts: OwnParts = NO_PARTS,
) -> Settings | None:
    """Return the validated dataclass that ``node`` describes; None if something is wrong, which is added to ``problems``.

    Args:
        node: the section's tree.
        settings: the section's dataclass.
        path: where ``node`` stands in the recipe.
        problems: collects what is wrong.
        also: further valid keys, which are read elsewhere, for the list of valid keys in messages.
        parts: what the recipe imports.
    """
    # the walk adds the keys in ``also`` only at the top of this section
    built = _Walk(problems, {path: tuple(also)}, parts).value(node, settings, path)
    return None if built is _WRONG else built


class _Walk:
    """Reads values out of a tree, guided by types."""

    def __init__(self, problems: Problems, also: dict[KeyPath, tuple[str, ...]], parts: OwnParts) -> None:
        self._problems = problems
        self._also = also
        self._parts = parts

    def value(self, node: Node, annotation: Any, path: KeyPath) -> Any:
        """Return the value for a key of type ``annotation``; ``_WRONG`` if it is refused."""
        section = _section_of(annotation)
        # a scalar decides by itself, because a word may stand for a section and one value for a list
        if isinstance(node, Scalar):
            return self._scalar(node, annotation, path)
        if isinstance(node, Listing):
            return self._listing(node, annotation, path)
        if section is not None:
            return self._section(node, section, path)
        items = _item_types(annotation)
        if items[-1:] == (Ellipsis,) and _section_of(items[0]) is not None:
            # one section for a list of sections is a list of one
            return self._listing(Listing([node], node.place), annotation, path)
        # a section without a dataclass: pattern -> scheme, or the free fields of a config
        inner = _value_type(annotation)
        if inner is None:
            return self._wrong(node, annotation, path)
        found = {key: self.value(entry.node, inner, (*path, key)) for key, entry in node.entries.items()}
        # the whole dict is refused for one value: what the rest means without it is not known
        return _WRONG if any(value is _WRONG for value in found.values()) else found

    def _wrong(self, given: Any, annotation: Any, path: KeyPath) -> Any:
        """Report that ``given`` has the wrong type."""
        self._problems.add(path, f"must be {described_type(annotation)}; got {shown_value(given)}{_hint(given, annotation)}")
        return _WRONG

    def _scalar(self, node: Scalar, annotation: Any, path: KeyPath) -> Any:
        section = _section_of(annotation)
        if section in SHORT_FORMS and not is_null(node):
            word = SHORT_FORMS[section]
            return self._section(Mapping(node.place, {word: Entry(node.place, node)}), section, path)
        items = _item_types(annotation)
        if items[-1:] == (Ellipsis,) and not is_null(node) and not _takes_alone(annotation):
            # one value for a list of any length is a list of one; a problem with a word is that of the key
            found = self.value(node, items[0], path if _section_of(items[0]) is None else (*path, 0))
            return _WRONG if found is _WRONG else (found,)
        found = read_scalar(node, annotation)
        if isinstance(found, str) and not found.isprintable():
            self._problems.add(path, "contains characters that cannot be printed; write plain text on one line")
            return _WRONG
        if isinstance(found, str) and _PASSWORD.search(found):
            # not shown: this would be printed, logged and written into the run folder
            self._problems.add(path, "contains an address with a name or password (://...@); give the address without it")
            return _WRONG
        typed = _typed(found, annotation)
        if typed is _WRONG:
            return self._wrong(found, annotation, path)
        if type(typed) in (int, float) and not (bounds := bounds_of(annotation)).allow(typed):
            given = f"{typed:,}" if isinstance(typed, int) else f"{typed:g}"
            self._problems.add(path, f"{given} is out of range; it {bounds.demand()}")
            return _WRONG
        return typed

    def _listing(self, node: Listing, annotation: Any, path: KeyPath) -> Any:
        section = _section_of(annotation)
        if section in SHORT_FORMS and _item_types(types_of(section)[SHORT_FORMS[section]]):
            # a list of words may stand for a section as one word may
            word = SHORT_FORMS[section]
            if any(isinstance(item, Mapping) for item in node.items):
                self._problems.add(path, f"a list has words alone, and options go with them: {_one_section(node, word, path)}")
                return _WRONG
            return self._section(Mapping(node.place, {word: Entry(node.place, node)}), section, path)
        items = _item_types(annotation)
        # Any takes a list of anything: the free fields of a model's config
        if Any in alternatives(annotation):
            items = (Any, Ellipsis)
        count = len(node.items)
        # a fixed tuple such as betas has a type per position, an open one the same type for all
        types = items[:1] * count if items[-1:] == (Ellipsis,) else items
        if not items or len(types) != count:
            return self._wrong(node, annotation, path)
        found = [self.value(item, types[index], (*path, index)) for index, item in enumerate(node.items)]
        if any(value is _WRONG for value in found):
            return _WRONG
        return found if items[0] is Any else tuple(found)

    def _section(self, node: Mapping, section: type, path: KeyPath) -> Any:
        chosen = self._chosen(node, section, path)
        if chosen is None:
            return _WRONG
        section, known = chosen, types_of(chosen)
        found = {}
        for key, entry in node.entries.items():
            if key not in known:
                # ``name`` of a stage is valid here and read elsewhere
                valid = (*self._also.get(path, ()), *known)
                self._problems.add((*path, key), unknown_key(key, valid))
                self._problems.excuse((*path, nearest_name(key, valid) or key))
            # a key without a value keeps its default: `- export:` is a stage with default settings
            elif not is_null(entry.node):
                found[key] = self.value(entry.node, known[key], (*path, key))
        missing = [key for entry in fields(section) if _required(entry) and (key := recipe_key(entry.name)) not in found]
        for key in missing:
            if not self._problems.excused((*path, key)):
                self._problems.add(path, f"needs the key '{key}': {described_type(known[key])}")
        # a dataclass with a wrong field is not built: its own checks would report the same fault in other words
        if missing or any(self._problems.touches((*path, key)) for key in node.entries):
            return _WRONG
        return self._built(section, found, path)

    def _chosen(self, node: Mapping, section: type, path: KeyPath) -> type | None:
        """Return the settings of the imported part that a section names, or ``section`` if it names none; None if no part has its name."""
        key, kind = SLOTS.get(section, ("", None))
        entry = node.entries.get(key)
        # a name that is no scalar is left to the section, which refuses its type
        if kind is None or entry is None or is_null(entry.node) or not isinstance(entry.node, Scalar):
            return section
        word, built_in = str(entry.node.value), choices(types_of(section)[key])
        if (made := self._parts.settings(kind, word)) is not None:
            return part_of_blend(made) if section is BlendPart else made
        # where nothing is imported, the section's own message says what is allowed
        if self._parts.files and word not in built_in:
            known = [*built_in, *self._parts.names(kind)]
            listed = f"known: {', '.join(known)}" if known else "the imported files register none"
            # the other keys of the section are not judged: they may be options of the part that is meant
            self._problems.add((*path, key), f"unknown {kind} '{word}'{did_you_mean(word, known) or ';'} {listed}")
            return None
        # of a data source or callback the section itself says so
        if built_in and not self._parts.files and word not in built_in and nearest_name(word, built_in) is None:
            allowed = described_type(types_of(section)[key])
            self._problems.add((*path, key), f"must be {allowed}; got {shown_value(entry.node)}; {NEEDS_IMPORT}")
            return None
        return section

    def _built(self, section: type, found: dict[str, Any], path: KeyPath) -> Any:
        """Return the dataclass, or report the problem that its own checks find."""
        try:
            # only ValueError: the checks of the dataclasses raise it for what a user gave, anything else is a fault of decoct's
            made = section(**{field_of(key): value for key, value in found.items()})
            # a form of writing stands for another dataclass (``decoct.WrittenAs``)
            return made.settled() if hasattr(section, "settled") else made
        except ValueError as error:
            message = str(error)
            # 'group_size=7 does not ...' is reported at the line of group_size
            named = message.partition("=")[0]
            self._problems.add((*path, named) if named in found else path, message)
            return _WRONG


def _one_section(node: Listing, word: str, path: KeyPath) -> str:
    """Return a list of words and sections as the one section that is meant, in YAML's short form."""
    words: list[str] = []
    options: dict[str, str] = {}
    for item in node.items:
        named = item.entries[word].node if isinstance(item, Mapping) and word in item.entries else item
        words += [str(named.value)] if isinstance(named, Scalar) else []
        for key, entry in item.entries.items() if isinstance(item, Mapping) else ():
            if key != word:
                options.setdefault(key, str(entry.node.value) if isinstance(entry.node, Scalar) else "...")
    listed = ", ".join([f"{word}: [{', '.join(words)}]", *(f"{key}: {value}" for key, value in options.items())])
    return f"{path[-1]}: {{{listed}}}"


def _section_of(annotation: Any) -> Any:
    """Return the dataclass in ``annotation``; None if there is none."""
    return next((option for option in alternatives(annotation) if is_dataclass(option)), None)


def _item_types(annotation: Any) -> tuple[Any, ...]:
    """Return the arguments of the tuple type in ``annotation``; () if there is none."""
    return next((get_args(option) for option in alternatives(annotation) if get_origin(option) is tuple), ())


def _takes_alone(annotation: Any) -> bool:
    """Whether a key that takes a list takes a single value as something of its own: a word, or a number beside lists of numbers."""
    return any(get_origin(option) is not tuple and option is not type(None) for option in alternatives(annotation))


def _value_type(annotation: Any) -> Any:
    """Return the type of the values of the dict in ``annotation``; None if there is none."""
    if Any in alternatives(annotation):
        return Any
    return next((get_args(option)[1] for option in alternatives(annotation) if get_origin(option) is dict), None)


def _required(entry: Any) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _typed(value: Any, annotation: Any) -> Any:
    """Return ``value`` if ``annotation`` allows it (a whole number as a float where floats are meant), else ``_WRONG``."""
    options = alternatives(annotation)
    # isinstance takes True for an int, but it is not a number here
    if Any in options or type(value) in options or (isinstance(value, str) and value in choices(annotation)):
        return value
    # beyond this, float() overflows
    if float in options and type(value) is int and abs(value) < 2**1023:
        return float(value)
    return _WRONG


def unknown_key(key: str, valid: Sequence[str]) -> str:
    """Return the message for an unknown key: its name here, its section, or the most similar key, and all valid keys."""
    # a key of another tool first: its nearest valid key would be a coincidence
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


def _hint(value: Any, annotation: Any) -> str:
    """Return a hint at what a refused value was probably meant to be."""
    if not isinstance(value, str):
        return ""
    # hints for numbers only where a number is taken; elsewhere 2kb may be a name
    numbers = {int, float} & set(alternatives(annotation))
    number = parse_number(value) if numbers else None
    if number is not None and number[0] == number[0].to_integral_value() and abs(number[0]) > LARGEST_INT:
        return f"; the largest whole number is {LARGEST_INT:,}"
    if numbers and value[:1].isdigit() and number is None:
        return "; suffixes are k, M and B (powers of 1000)"
    return did_you_mean(value, choices(annotation))


def shown_value(value: Any) -> str:
    """Return a value as quoted in messages, shortened."""
    if isinstance(value, Mapping):
        return "a section of keys"
    if isinstance(value, Listing):
        return f"a list of {len(value.items)}"
    if isinstance(value, Scalar):
        value = value.value
    if value is None or value == "":
        return "nothing"
    # written as in YAML: true, not True
    text = str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
