"""A recipe as a tree of plain values that know their place: a file and line, or an override.

YAML files, Python data and overrides all become this tree, so that one reader with one set of messages handles all three.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models.common.errors import UserError

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top of the recipe, such as ``('stages', 0, 'distill', 'tokens')``."""


@dataclass
class Scalar:
    """One value. From a file it is text whose meaning depends on the type of its key; from Python it may already be a number."""

    value: str | int | float | bool | None
    place: str
    plain: bool = True
    """Written without quotes, so that null and true are not text."""


@dataclass
class Listing:
    """A list."""

    items: "list[Node]"
    place: str


@dataclass
class Entry:
    """A key's place and its value."""

    place: str
    node: "Node"


@dataclass
class Mapping:
    """Keys and values, in the order they were written."""

    place: str
    entries: dict[str, Entry] = field(default_factory=dict)


Node = Scalar | Listing | Mapping


def dotted(path: Sequence[str | int]) -> str:
    """Return a key path as in messages and overrides: ``stages.0.distill.tokens``."""
    return ".".join(str(part) for part in path)


def place_of(root: Node, path: Sequence[str | int]) -> str:
    """Return the place of the deepest part of ``path`` that the recipe contains."""
    node, place = root, root.place
    for part in path:
        # the key's own line, which is nearer to the mistake than that of the section
        if isinstance(node, Mapping) and part in node.entries:
            entry = node.entries[str(part)]
            node, place = entry.node, entry.place
        elif isinstance(node, Listing) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
            place = node.place
        else:
            break
    return place


def is_null(node: Node) -> bool:
    """Return whether the value is absent: nothing after the colon, ``null`` or ``~``."""
    # the spellings of null in YAML's core schema; quoted they are text
    return isinstance(node, Scalar) and (node.value is None or (node.plain and node.value in ("", "~", "null", "Null", "NULL")))


def node_from_python(data: Any, place: str = "", path: KeyPath = ()) -> Node:
    """Return the tree of plain Python data (dict, list, tuple, str, int, float, bool, None); UserError for anything else."""
    if isinstance(data, dict):
        for key in data:
            # the key stands in a message before any check of its own, so what cannot be printed must not reach the terminal
            if not isinstance(key, str) or not key.isprintable():
                raise UserError(f"recipe key {dotted((*path, ascii(key)))} is not plain text; keys are printable strings")
        return Mapping(place, {key: Entry(place, node_from_python(value, place, (*path, key))) for key, value in data.items()})
    if isinstance(data, list | tuple):
        return Listing([node_from_python(value, place, (*path, index)) for index, value in enumerate(data)], place)
    # "plain" is for YAML without quotes; a Python string 'null' is meant as text
    if data is None or isinstance(data, str | int | float):
        return Scalar(data, place, plain=False)
    raise UserError(f"recipe value {dotted(path) or 'of the whole recipe'} is a {type(data).__name__}; give text, numbers, lists and dicts")
