"""The JSON Schema (draft 2020-12) of recipes, made from the settings dataclasses: editors complete and check keys with it.

It knows what one key takes: type, choices, bounds, suffix forms ("1M", "5%") as text, and what may be left empty. It also knows the keys of
which a section needs exactly one (``exactly_one``) or one at least (``at_least_one``). In a recipe with ``import`` it takes further kinds
of stages, and other names and keys where a part may be named; which ones there are, only the loader knows. Other rules about several keys
are left to ``decoct plan`` and ``decoct run``. The package holds it as ``configs/recipe.schema.json``, for ``decoct recipes schema``.
"""

import json
from collections.abc import Collection
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin

from .. import alternatives, bounds_of, choices, recipe_key, types_of
from ..trainer.settings_own import CallbackSettings
from ..trainer.stages.registry import STAGE_KINDS
from .field_docs import class_doc, field_docs
from .reading import KEYS, NAME_PATTERN, REQUIRED
from .recipe import Recipe
from .sections import SHORT_FORMS

_DIGITS = r"[0-9]+(_[0-9]+)*"
_EXPONENT = r"[eE][+-]?[0-9]{1,3}"
_WHOLE = rf"({_DIGITS}|({_DIGITS}(\.[0-9]*)?|\.[0-9]+)({_EXPONENT}[kMB]?|[kMB]))"
"""A whole number as text: 64, 1_024, 500k, 1.5M, 1e3."""
_NUMBER = rf"({_DIGITS}(\.[0-9]*)?|\.[0-9]+)({_EXPONENT})?[kMB%]?"
"""A number as text: 0.1, 1e-4, 5%."""
_TEXT = r"^(?!.*://[^/\s]*@)[^\x00-\x1f]*$"
"""Text on one line, without a password in an address."""


def schema_text() -> str:
    """Return the schema as stored in the package: JSON, one key per line."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe; ``$defs`` has every dataclass that recipes consist of."""
    definitions: dict[str, Any] = {}
    docs = field_docs(Recipe)
    types = types_of(Recipe)
    properties: dict[str, Any] = {}
    for key in KEYS:
        if key in _WITH_PARTS:
            # what they take depends on ``import``: see the condition below
            made = {}
        elif key == "import":
            made = _or_null(_value(tuple[str, ...], definitions))
        elif key == "name":
            # YAML reads a name such as 2024 as a number
            made = {"type": ["string", "integer", "null"], "pattern": f"^({NAME_PATTERN})$"}
        else:
            made = _value(types[key], definitions)
            if key not in REQUIRED:
                made = _or_null(made)
        properties[key] = {"description": docs["imports" if key == "import" else key], **made}
    without, with_parts = _sections(definitions), _sections_with_parts(definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "decoct recipe",
        "description": class_doc(Recipe),
        "type": "object",
        "properties": properties,
        "required": list(REQUIRED),
        "additionalProperties": False,
        # the loader's rule as a condition: without ``import`` an unknown kind or source is an error that an editor should mark
        "allOf": [{"if": _given("import"), "then": {"properties": with_parts}, "else": {"properties": without}}],
        "$defs": definitions,
    }


_WITH_PARTS = ("data", "stages")
"""Sections that may name imported parts."""


_OPEN = {"LossSettings": "divergence", "DataSettings": "source", "BlendPart": "source"}
"""Definition -> the key that may name an imported part, whose options stand beside it."""
_ENDING = "WithParts"
"""End of the names of definitions that differ in recipes that import files."""


def _sections(definitions: dict[str, Any], *, own: bool = False) -> dict[str, Any]:
    """Return the schemas of ``_WITH_PARTS``; ``own`` takes kinds of stages that are not decoct's."""
    data = _value(types_of(Recipe)["data"], definitions)
    return {"data": data, "stages": {"type": "array", "minItems": 1, "items": _stage(definitions, own=own)}}


def _sections_with_parts(definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of ``_WITH_PARTS`` in a recipe that imports files; definitions that differ there are added."""
    sections = _sections(definitions, own=True)
    differ = set(_OPEN)
    # and those that lead to one that differs
    while more := {name for name, made in definitions.items() if name not in differ and _references(made) & differ}:
        differ |= more
    # in order, so that the stored schema is the same at each making
    definitions.update({f"{name}{_ENDING}": _renamed(_opened(name, definitions[name]), differ) for name in sorted(differ)})
    return _renamed(sections, differ)


def _opened(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """Return a definition that also takes imported parts."""
    if name not in _OPEN:
        return section
    key = _OPEN[name]
    # the choices go, since any imported name may stand there; what the editor shows of the key stays
    known = {inner: value for inner, value in section["properties"][key].items() if inner in ("description", "default")}
    named = {**known, "type": ["string", "null"], "pattern": _TEXT}
    # the options of the part stand beside its name, and only its own file knows them
    return {**section, "properties": {**section["properties"], key: named}, "additionalProperties": True}


def _references(node: Any) -> set[str]:
    """Return the names of the definitions that a schema refers to."""
    if isinstance(node, dict):
        # "#/$defs/Name": the name is what follows the last slash
        own = {node["$ref"].rpartition("/")[2]} if "$ref" in node else set[str]()
        return own.union(*map(_references, node.values()))
    return set[str]().union(*map(_references, node)) if isinstance(node, list) else set()


def _renamed(node: Any, differ: Collection[str]) -> Any:
    """Return a schema whose references to definitions in ``differ`` lead to those of recipes that import files."""
    if isinstance(node, dict):
        named = node.get("$ref", "").rpartition("/")[2] in differ
        return {key: f"{value}{_ENDING}" if key == "$ref" and named else _renamed(value, differ) for key, value in node.items()}
    return [_renamed(item, differ) for item in node] if isinstance(node, list) else node


def _stage(definitions: dict[str, Any], *, own: bool) -> dict[str, Any]:
    """Return the schema of one entry of ``stages``: a kind alone, or a kind with its settings; ``own`` takes other kinds too."""
    kinds = {}
    for kind, stage in STAGE_KINDS.items():
        section = _reference(stage.settings, definitions, kind)
        kinds[kind] = section if _needed(stage.settings) else _or_null(section)
    alone: dict[str, Any] = {"enum": [kind for kind, stage in STAGE_KINDS.items() if not _needed(stage.settings)]}
    if own:
        needed = [kind for kind, stage in STAGE_KINDS.items() if _needed(stage.settings)]
        # any name may be an imported kind, but a kind of decoct's that needs settings cannot stand alone
        alone = {"type": "string", "pattern": f"^({NAME_PATTERN})$", "not": {"enum": needed}}
    # a kind with nothing below it is ``- export:``, whose value is null
    others: Any = {"type": ["object", "null"]} if own else False
    # a stage is a mapping with one key; YAML has no other way to name a kind and its settings together
    below = {"type": "object", "properties": kinds, "minProperties": 1, "maxProperties": 1, "additionalProperties": others}
    return _cased("object", below, alone)


def _reference(settings: type, definitions: dict[str, Any], kind: str | None = None) -> dict[str, Any]:
    """Return a reference to a dataclass, which is added to ``definitions`` if it is missing. A stage also has a ``name``."""
    name = settings.__name__
    if name not in definitions:
        definitions[name] = {}  # holds its place in the order
        properties: dict[str, Any] = {}
        if kind is not None:
            # a stage that had the name of another kind would make ``stages.KIND`` in an override ambiguous
            others = [other for other in STAGE_KINDS if other != kind]
            properties["name"] = {
                "description": f"Name of the stage and of its folder. Default: {kind}.",
                "type": ["string", "null"],
                # all digits would be a position in overrides
                "pattern": f"^(?![0-9]+$)({NAME_PATTERN})$",
                "not": {"enum": others},
            }
        properties |= {recipe_key(entry.name): _property(settings, entry, definitions) for entry in fields(settings)}
        required = [recipe_key(entry.name) for entry in fields(settings) if _required(entry)]
        definitions[name] = {
            "description": class_doc(settings),
            "type": "object",
            "properties": properties,
            # left out where empty: an empty ``oneOf`` is no valid schema, and an empty ``required`` says nothing
            **({"required": required} if required else {}),
            **({"oneOf": [_given(key) for key in exactly_one]} if (exactly_one := _exactly_one(settings)) else {}),
            **({"anyOf": [_given(key) for key in at_least_one]} if (at_least_one := _at_least_one(settings)) else {}),
            # the options of a callback stand beside its name
            "additionalProperties": settings is CallbackSettings,
        }
    return {"$ref": f"#/$defs/{name}"}


def _exactly_one(settings: type) -> tuple[str, ...]:
    """The keys of which a section has exactly one."""
    return getattr(settings, "exactly_one", ())


def _at_least_one(settings: type) -> tuple[str, ...]:
    """The keys of which a section has one or more."""
    return getattr(settings, "at_least_one", ())


def _given(key: str) -> dict[str, Any]:
    """A key is there and has a value."""
    # null does not count as given: YAML reads a key without a value as null, and the loader skips it
    return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}


def _needed(settings: type) -> bool:
    """Whether a section cannot be left empty."""
    return bool(_exactly_one(settings) or _at_least_one(settings)) or any(map(_required, fields(settings)))


def _cased(kind: str, section: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``section`` for values of a JSON type, ``other`` for the rest.

    With ``anyOf`` an editor could only say that the whole value fits neither; with a condition it marks the key inside that is wrong.
    """
    return {"if": {"type": kind}, "then": section, "else": other}


def _required(entry: Any) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _property(settings: type, entry: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one key: its description, what it takes, and its default."""
    made = _value(types_of(settings)[recipe_key(entry.name)], definitions)
    if not _required(entry):
        made = _or_null(made)
    # a default of None is left out: the description says what happens without the key
    default = {} if entry.default is MISSING or entry.default is None else {"default": entry.default}
    return {"description": field_docs(settings)[entry.name], **made, **default}


def _or_null(made: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that also allows null: a key without a value keeps its default."""
    if "type" in made:
        types = made["type"] if isinstance(made["type"], list) else [made["type"]]
        return {**made, "type": [*types, "null"]}
    if "enum" in made:
        return {**made, "enum": [*made["enum"], None]}
    null = {"type": "null"}
    # in a condition, null belongs where the values are that are not objects
    if "if" in made:
        return {**made, "else": _or_null(made["else"])}
    # what stands beside a reference is asked for as well, so null cannot be one more type: it is a case of its own
    if "$ref" in made:
        return _cased("null", {}, made)
    return {**made, "anyOf": [*made["anyOf"], null]} if "anyOf" in made else {"anyOf": [made, null]}


def _value(annotation: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of what a key of this type takes, as ``sections.py`` reads it."""
    options = [option for option in alternatives(annotation) if option is not type(None)]
    # numbers and choices depend on the annotation as a whole (bounds, words), all else on one member of it
    made = [_number(annotation, option) for option in options if option in (int, float)]
    made += [inner for option in options for inner in _option(option, definitions)]
    if words := choices(annotation):
        # YAML reads 32 as a number where a recipe means the word
        made.insert(0, {"enum": [*words, *(int(word) for word in words if word.isdigit())]})
    # a section and its short form: as a condition, which tells an editor in which of the two a mistake is
    if len(made) == 2 and "$ref" in made[0]:
        return _cased("object", made[0], made[1])
    return made[0] if len(made) == 1 else {"anyOf": made}


def _number(annotation: Any, option: type) -> dict[str, Any]:
    bounds = bounds_of(annotation)
    named = {"minimum": bounds.ge, "exclusiveMinimum": bounds.gt, "maximum": bounds.le, "exclusiveMaximum": bounds.lt}
    types, digits = (["integer", "string"], _WHOLE) if option is int else (["number", "string"], _NUMBER)
    # a pattern cannot check the size of a number that is written as text, but it can check its sign
    sign = "[+-]?" if bounds.allow(-1e-9) or bounds.allow(-1) else "[+]?"
    return {"type": types, **{key: limit for key, limit in named.items() if limit is not None}, "pattern": f"^{sign}{digits}$"}


def _option(option: Any, definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of one member of a type, except numbers and choices."""
    if is_dataclass(option) and isinstance(option, type):
        word = SHORT_FORMS.get(option)
        # a key that takes a list of words takes one word too, and so does the short form
        short = [_value(types_of(option)[word], definitions)] if word else []
        return [_reference(option, definitions), *short]
    inner = get_args(option)
    if get_origin(option) is tuple and inner[-1] is Ellipsis:
        # one value stands for a list of one
        item = _value(inner[0], definitions)
        return [_cased("array", {"type": "array", "items": item}, item)]
    if get_origin(option) is tuple:
        return [{"type": "array", "items": _value(inner[0], definitions), "minItems": len(inner), "maxItems": len(inner)}]
    if get_origin(option) is dict:
        free = inner[1] is Any
        return [{"type": "object"} | ({} if free else {"additionalProperties": _value(inner[1], definitions)})]
    if option is bool:
        return [{"type": "boolean"}]
    # where text is meant, numbers and truth values are taken as the text that was written
    return [{"type": ["string", "number", "boolean"], "pattern": _TEXT}] if option is str else []
