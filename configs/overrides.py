"""Dotted overrides from the command line: ``stages.1.tokens=2B``, ``data.files=[a.txt,b.txt]``, ``logger={kind: wandb}``.

An override is written into the recipe's tree before it is read, so its value gets the same meaning and the same messages as one in
the file. A stage is addressed by its position (from 0), by its ``name``, by its folder's name, or by its kind when there is only one
of it; the kind after that may be left out. Dots separate keys, except in the pattern of ``stages.qat.overrides.*.mlp.down_proj.bits=8``.
"""

from collections.abc import Sequence
from typing import Any

from .. import types_of
from ..models.common.errors import UserError
from ..qat.scheme import SpecChange
from .nodes import Entry, Listing, Mapping, Node, Scalar, is_null, node_from_python
from .own_parts import OwnParts
from .problems import did_you_mean
from .reading import SECTIONS, known_kinds, stage_parts
from .recipe import stage_name
from .sections import NO_PARTS, SHORT_FORMS
from .yaml_source import read_yaml_text

Override = str | tuple[str, Any]
"""``key=value`` as on the command line, or from Python a key and its value."""


def key_of(override: Override) -> str:
    """Return the dotted key of an override."""
    return (override.partition("=")[0] if isinstance(override, str) else override[0]).strip()


def value_of(override: Override) -> Any:
    """Return the value of an override: its text, or the object from Python."""
    return override.partition("=")[2].strip() if isinstance(override, str) else override[1]


def place_of_override(override: Override) -> str:
    """Return how messages name an override; every node that it writes has this place."""
    return f"override '{override if isinstance(override, str) else override[0]}'"


def apply_overrides(root: Node, overrides: Sequence[Override], parts: OwnParts = NO_PARTS) -> None:
    """Write overrides into the tree, in order; UserError for one whose key does not exist."""
    kinds = known_kinds(parts)
    for override in overrides:
        keys = [key.strip() for key in key_of(override).split(".")]
        place = place_of_override(override)
        if not all(keys) or (isinstance(override, str) and "=" not in override):
            raise UserError(f"{place}: write key=value, such as trainer.precision=32 or stages.1.tokens=2M")
        # the recipe is no mapping, which reading it reports
        if not isinstance(root, Mapping):
            return
        if isinstance(override, str):
            node = _value(override.partition("=")[2].strip(), place)
        else:
            node = node_from_python(override[1], place, tuple(keys))
        if keys[0] == "stages":
            _override_stage(root, keys[1:], node, place, kinds)
        else:
            _write(root, keys, node, place, above="")


def _value(text: str, place: str) -> Node:
    """Parse a value: a mapping in braces, a list in brackets, quoted text, or a scalar."""
    if text.startswith("{") and text.endswith("}"):
        # YAML's own flow form; its problems have the override's text for a place, not a line
        node, problems = read_yaml_text(text, place, lines=False)
        problems.stop()
        return node
    if text.startswith("[") and text.endswith("]"):
        inner = text[1:-1].strip()
        return Listing([_value(item.strip(), place) for item in _items(inner)] if inner else [], place)
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return Scalar(text[1:-1], place, plain=False)
    return Scalar(text, place)


def _items(text: str) -> list[str]:
    """Split the inside of a list at the commas that are in no quotes, braces or brackets.

    YAML's flow form is not used for lists, because it takes the pattern in ``skip=[*.o_proj]`` for an alias.
    """
    items, item, quote, depth, before = [], "", "", 0, ","
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        # as in YAML, quotes and brackets count where a value begins: not in it's.txt, and not in a[0].txt
        elif char in "'\"" and before in ",[{:":
            quote = char
        elif char in "[{" and (depth or before == ","):
            depth += 1
        elif char in "]}" and depth:
            depth -= 1
        elif char == "," and not depth:
            items.append(item)
            item, before = "", ","
            continue
        item += char
        before = before if char.isspace() else char
    return [*items, item]


def _write(mapping: Mapping, keys: Sequence[str], node: Node, place: str, above: str) -> None:
    """Set ``keys`` below ``mapping``; missing sections on the way are created."""
    key, *rest = keys
    if not rest:
        mapping.entries[key] = Entry(place, node)
        return
    entry = mapping.entries.get(key)
    if entry is None or is_null(entry.node):
        entry = mapping.entries[key] = Entry(place, Mapping(place))
    # ``logger: wandb`` in the file and logger.project=... on the command line: the word (or the list of words) becomes the section that it
    # is short for
    elif isinstance(entry.node, Scalar | Listing) and not above and SECTIONS.get(key) in SHORT_FORMS:
        word = SHORT_FORMS[SECTIONS[key]]
        entry.node = Mapping(entry.node.place, {word: Entry(entry.place, entry.node)})
    # a key below a list or a value cannot be written without guessing what happens to the rest
    if not isinstance(entry.node, Mapping):
        raise UserError(f"{place}: {above}{key} is {'a list' if isinstance(entry.node, Listing) else 'a single value'}; set it as a whole")
    _write(entry.node, rest, node, place, above=f"{above}{key}.")


def _override_stage(root: Mapping, keys: Sequence[str], node: Node, place: str, kinds: dict[str, type]) -> None:
    stages = root.entries["stages"].node if "stages" in root.entries else None
    if not isinstance(stages, Listing):
        raise UserError(f"{place}: the recipe has no list of stages")
    if len(keys) < 2:
        raise UserError(f"{place}: name a stage and a key of it, such as stages.0.tokens=2M; {_known_stages(stages)}")
    index = _find_stage(stages, keys[0], place)
    parts = stage_parts(stages.items[index])
    if parts is None or parts[0] not in kinds:
        # the stage itself is wrong; reading the recipe reports how
        return
    kind, body = parts
    rest = list(keys[1:])
    # a kind may be named after the stage, unless it is also a key of the stage's own
    if rest[0] in kinds and rest[0] not in types_of(kinds[kind]):
        if rest[0] != kind:
            raise UserError(f"{place}: stages.{keys[0]} is a '{kind}' stage, not '{rest[0]}'; {_known_stages(stages)}")
        rest = rest[1:]
    if not rest or not isinstance(body, Mapping):
        raise UserError(f"{place}: name a key of the stage, such as stages.{keys[0]}.tokens=2M")
    rest = _joined_pattern(rest, kind, place, kinds[kind])
    old = stages.items[index]
    key_place = old.entries[kind].place if isinstance(old, Mapping) else old.place
    # ``- export`` has no body to write into, so every stage gets the long form
    stages.items[index] = Mapping(old.place, {kind: Entry(key_place, body)})
    _write(body, rest, node, place, above=f"stages.{keys[0]}.{kind}.")


def _joined_pattern(keys: list[str], kind: str, place: str, settings: type) -> list[str]:
    """Return the keys below a stage, with the pattern in ``overrides.*.mlp.down_proj.bits`` as one key, since module names have dots."""
    if keys[0] != "overrides" or len(keys) == 1 or "overrides" not in types_of(settings):
        return keys
    if len(keys) < 3 or keys[-1] not in types_of(SpecChange):
        raise UserError(
            f"{place}: overrides needs a pattern of module names and one of {', '.join(types_of(SpecChange))}, such as "
            f"stages.{kind}.overrides.*.mlp.down_proj.bits=8"
        )
    # all but the first and the last word are the pattern: ``*.mlp.down_proj``
    return ["overrides", ".".join(keys[1:-1]), keys[-1]]


def _labels(stages: Listing) -> list[tuple[str, str]]:
    """Return kind and name of each stage, as far as they are known before the recipe is validated."""
    found = []
    for item in stages.items:
        kind, body = stage_parts(item) or ("?", item)
        entry = body.entries.get("name") if isinstance(body, Mapping) else None
        label = str(entry.node.value) if entry and isinstance(entry.node, Scalar) and not is_null(entry.node) else kind
        found.append((kind, label))
    return found


def _known_stages(stages: Listing) -> str:
    return "stages: " + ", ".join(f"{i} ({stage_name(i, label)})" for i, (_, label) in enumerate(_labels(stages)))


def _find_stage(stages: Listing, word: str, place: str) -> int:
    """Return the position of the stage that ``word`` names."""
    labels = _labels(stages)
    if word.isascii() and word.isdigit():
        # six digits are enough for a position, and int() refuses texts of thousands
        if int(word[:6]) < len(labels):
            return int(word[:6])
        raise UserError(f"{place}: there is no stage {word}; {_known_stages(stages)}")
    # from the most specific name to the least: folder, own name, kind
    for match in (
        [i for i, (_, label) in enumerate(labels) if word == stage_name(i, label)],
        [i for i, (kind, label) in enumerate(labels) if word == label != kind],
        [i for i, (kind, _) in enumerate(labels) if word == kind],
    ):
        if len(match) == 1:
            return match[0]
        if match:
            raise UserError(f"{place}: '{word}' is more than one stage; use the position; {_known_stages(stages)}")
    # each stage by every word that would have found it
    names = [name for i, (kind, label) in enumerate(labels) for name in (stage_name(i, label), label, kind)]
    raise UserError(f"{place}: there is no stage '{word}'{did_you_mean(word, names) or ';'} {_known_stages(stages)}")
