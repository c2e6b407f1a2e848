"""Reads YAML as plain data: a file becomes a tree with line numbers.

A recipe has no tags, no anchors and aliases (ten lines of them can expand to gigabytes), no second document and no interpolation, and is at
most a megabyte. Scalars stay text: the type of its key decides what ``1e-4``, ``no`` or ``1M`` means, which avoids the traps of YAML 1.1's
own types (``no`` a boolean, ``010`` an octal number, ``1e-4`` a string).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..models.common.errors import UserError
from .nodes import Entry, KeyPath, Listing, Mapping, Node, Scalar
from .problems import Problems

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
MAX_VALUES = 10_000


def read_yaml_file(path: Path, label: str) -> tuple[Node, Problems]:
    """Return the tree of a file and the problems found so far, with ``label`` as its name; UserError if it cannot be read as YAML."""
    try:
        with path.open("rb") as file:
            # one byte more than allowed shows that there is more, without reading all of it
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{label} cannot be read ({error.strerror}); give a recipe file or the name of a shipped recipe") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{label} is larger than {MAX_BYTES:,} bytes; a recipe holds settings only, text belongs in data.files")
    try:
        # editors on Windows begin a file with a byte order mark
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{label}:{line}: not UTF-8 text (byte {error.start}); is this a recipe?") from None
    return read_yaml_text(text, label)


def read_yaml_text(text: str, label: str, *, lines: bool = True) -> tuple[Node, Problems]:
    """Return the tree of YAML text; duplicate keys are collected as problems, unreadable text raises UserError.

    Args:
        text: One document.
        label: Its name in messages.
        lines: Whether a place is ``label`` with a line number, or ``label`` alone for text of one line.
    """
    try:
        # events and not yaml.load: only they have lines, quotes and anchors, and nothing is constructed
        return _Builder(label, yaml.parse(text, Loader=yaml.SafeLoader), lines=lines).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        told = "; ".join(part for part in (error.context, error.problem) if part)
        place = f"{label}:{line}" if lines else label
        raise UserError(f"{place}: not readable as YAML: {told}{_hint(told)}") from None
    # a forbidden character is a YAMLError without a place, an escape beyond Unicode a bare ValueError of chr()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # UserError is a ValueError, and the messages of _Builder are already complete
        if isinstance(error, UserError):
            raise
        raise UserError(f"{label}: not readable as YAML: {str(error).splitlines()[0]}") from None


def _hint(told: str) -> str:
    """Return the remedy for usual mistakes in recipes: globs, tabs, colons in text."""
    if "\\t" in told:
        return "; indent with spaces, not tabs"
    if "an alias" in told or "an anchor" in told or "cannot start any token" in told:
        return "; quote text that begins with a special character: '*.txt'"
    return "; quote text that contains a colon and a space" if "mapping values are not allowed" in told else ""


class _Builder:
    """Turns the parser's events into nodes."""

    def __init__(self, label: str, events: Iterator[Any], *, lines: bool) -> None:
        self._label = label
        self._lines = lines
        self._events = events
        self._duplicates: list[tuple[KeyPath, str, str]] = []
        self._values = 0

    def document(self) -> tuple[Node, Problems]:
        root: Node | None = None
        for event in self._events:
            if isinstance(event, yaml.StreamStartEvent | yaml.StreamEndEvent | yaml.DocumentStartEvent | yaml.DocumentEndEvent):
                continue
            if root is not None:
                raise UserError(f"{self._place(event)}: a second YAML document; a recipe file holds one recipe")
            root = self._node(event, ())
        if root is None:
            raise UserError(f"{self._label} is empty; copy a shipped recipe to start from: decoct recipes copy quickstart")
        problems = Problems(self._label, root)
        for path, place, message in self._duplicates:
            problems.add(path, message, place=place)
        return root, problems

    def _place(self, event: Any) -> str:
        return f"{self._label}:{event.start_mark.line + 1}" if self._lines else self._label

    def _node(self, event: Any, path: KeyPath) -> Node:
        place = self._place(event)
        # refused at the parser's events, before anything is expanded
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise UserError(
                f"{place}: YAML anchors (&) and aliases (*) are not allowed in a recipe; quote the text if it is meant literally"
            )
        if event.tag is not None:
            raise UserError(f"{place}: YAML tag {event.tag!r} is not allowed in a recipe; quote the text if it is meant literally")
        if len(path) > MAX_DEPTH:
            raise UserError(f"{place}: nested more than {MAX_DEPTH} levels deep, which no recipe needs")
        # counted while reading, so that a file of nested lists stops early
        self._values += 1
        if self._values > MAX_VALUES:
            raise UserError(f"{place}: more than {MAX_VALUES:,} keys and values; is this a recipe?")
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(event.value, place, plain=event.style is None)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._listing(place, path)
        return self._mapping(place, path)

    def _listing(self, place: str, path: KeyPath) -> Listing:
        items: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items))))
        return Listing(items, place)

    def _mapping(self, place: str, path: KeyPath) -> Mapping:
        found = Mapping(place)
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                # ``? [a, b] : c`` and ``{a: 1}: 2`` are YAML, but no key of a recipe
                raise UserError(f"{self._place(event)}: a list or mapping cannot be a key")
            key = self._node(event, path)
            name = str(key.value) if isinstance(key, Scalar) else ""
            if not name.isprintable():
                raise UserError(f"{key.place}: a key contains characters that cannot be printed; write plain text")
            node = self._node(next(self._events), (*path, name))
            # PyYAML itself would silently keep the last
            if name in found.entries:
                first = found.entries[name].place.rpartition(":")[2]
                second = key.place.rpartition(":")[2]
                where = f", on lines {first} and {second}" if self._lines else ""
                self._duplicates.append(((*path, name), key.place, f"given twice{where}; keep one"))
            else:
                found.entries[name] = Entry(key.place, node)
        return found
