"""Turns a recipe's tree into a Recipe: the sections, the list of stages, then the checks across them."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.settings import StudentSettings, TeacherSettings
from ..trainer.settings import DataSettings, LoggerSettings, TrainerSettings
from ..trainer.stages.registry import STAGE_KINDS
from .auto_widths import exportable_widths
from .checks import check_draft
from .draft import Draft
from .nodes import Entry, KeyPath, Listing, Mapping, Node, Scalar, is_null, place_of
from .own_parts import NEEDS_IMPORT, OwnParts
from .problems import Problems, did_you_mean, nearest_name
from .recipe import Recipe, Seed, StageEntry, stage_name
from .sections import NO_PARTS, read_settings, shown_value, unknown_key

SECTIONS: dict[str, type] = {
    "teacher": TeacherSettings,
    "student": StudentSettings,
    "data": DataSettings,
    "trainer": TrainerSettings,
    "logger": LoggerSettings,
}
KEYS = ("name", "seed", "import", "teacher", "student", "data", "stages", "trainer", "logger")
REQUIRED = ("student", "data", "stages")
"""Required keys; a recipe that does not come from a file also needs a name."""
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""Names of runs and stages, which also name folders, as a regular expression."""
_EXAMPLES = {
    "student": "the model to start from, such as student: {keep: {layers: 8}}",
    "data": "the text, such as data: {files: ['corpus/*.txt']}",
    "stages": "what to do, such as stages: [{distill: {tokens: 10M}}]",
    "name": "the name of the run and its folder",
}
_NAME = re.compile(NAME_PATTERN)
_NAME_RULE = "use letters, digits, '.', '_' and '-', at most 100, a letter or digit first: it names a folder"


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The top-level keys that are not sections."""

    name: str | None = None
    seed: Seed = 0


def read_recipe(root: Node, problems: Problems, *, default_name: str | None, parts: OwnParts = NO_PARTS) -> Recipe:
    """Return the validated recipe; UserError with everything that is wrong.

    Args:
        root: tree of the file, overrides applied.
        problems: the problems found so far.
        default_name: name of a recipe without one (a file's stem); None makes the key required.
        parts: what its ``import`` registers.
    """
    if not isinstance(root, Mapping):
        problems.add((), f"a recipe is a set of keys ({', '.join(KEYS)}); got {shown_value(root)}")
        problems.stop()
    assert isinstance(root, Mapping)
    for key in root.entries:
        if key not in KEYS:
            problems.add((key,), unknown_key(key, KEYS))
            # the key that was probably meant is not reported as missing too; a key like no other excuses itself, which has no effect
            problems.excuse((nearest_name(key, KEYS) or key,))
    # no early return from here on: a reader should get every problem of a file in one message
    name, seed = _read_head(root, problems, default_name)
    sections = {key: _read_section(root, key, problems, parts) for key in SECTIONS}
    stages = exportable_widths(_read_stages(root, problems, parts), problems)
    # a misspelt or broken teacher must not also be reported as a missing one
    untouched = not (problems.touches(("teacher",)) or problems.excused(("teacher",)))
    draft = Draft(**{key: sections[key] for key in ("teacher", "student", "data", "trainer")}, stages=stages, teacher_is_known=untouched)
    check_draft(draft, problems)
    # the one place that stops: every check above has added what it knows
    problems.stop()
    return Recipe(name=name, seed=seed, imports=parts.files, stages=tuple(entry for entry in stages if entry), **sections)


def _given(root: Mapping, key: str) -> bool:
    return key in root.entries and not is_null(root.entries[key].node)


def _need(key: str, problems: Problems) -> None:
    if not problems.excused((key,)):
        problems.add((), f"needs the key '{key}': {_EXAMPLES[key]}")


def _read_head(root: Mapping, problems: Problems, default_name: str | None) -> tuple[str, int]:
    # name and seed are no section, but are read by the same walk, with the same messages
    head = Mapping(root.place, {key: root.entries[key] for key in ("name", "seed") if key in root.entries})
    settings = read_settings(head, _Head, (), problems)
    if settings is None:
        return "", 0
    name = default_name if settings.name is None else settings.name
    if name is None:
        _need("name", problems)
    elif not _NAME.fullmatch(name):
        problems.add(("name",), f"{shown_value(name)} cannot name a run; {_NAME_RULE}")
    return name or "", settings.seed


def _read_section(root: Mapping, key: str, problems: Problems, parts: OwnParts) -> Any:
    """Return the settings of a section; if it is absent, its defaults or None; if it is wrong, None."""
    if not _given(root, key):
        if key in REQUIRED:
            _need(key, problems)
        # trainer and logger consist of defaults alone, so a recipe may leave them out
        return SECTIONS[key]() if key in ("trainer", "logger") else None
    return read_settings(root.entries[key].node, SECTIONS[key], (key,), problems, parts=parts)


def _read_stages(root: Mapping, problems: Problems, parts: OwnParts) -> list[StageEntry | None]:
    """Return the stages in order; None for one that is wrong."""
    if not _given(root, "stages"):
        _need("stages", problems)
        return []
    node = root.entries["stages"].node
    if not isinstance(node, Listing):
        problems.add(("stages",), f"must be a list of stages ('- distill: {{tokens: 10M}}' and so on, in order); got {shown_value(node)}")
        return []
    kinds = known_kinds(parts)
    if not node.items:
        problems.add(("stages",), f"is empty; name at least one of {', '.join(kinds)}")
    stages = [_read_stage(item, index, problems, kinds, parts) for index, item in enumerate(node.items)]
    _check_labels(stages, root, problems)
    return stages


def known_kinds(parts: OwnParts) -> dict[str, type]:
    """Return the settings of every kind of stage: decoct's, then those that the recipe imports."""
    # a part's own kinds come last, since they cannot have the name of one of decoct's
    own = {name: made for name in parts.names("stage") if (made := parts.settings("stage", name)) is not None}
    return {**{kind: stage.settings for kind, stage in STAGE_KINDS.items()}, **own}


def _read_stage(node: Node, index: int, problems: Problems, kinds: dict[str, type], parts: OwnParts) -> StageEntry | None:
    found = stage_parts(node)
    path: KeyPath = ("stages", index)
    if found is None:
        problems.add(path, _shape_message(node, kinds))
        return None
    kind, body = found
    if kind not in kinds:
        guess = did_you_mean(kind, kinds)
        own = "" if guess or parts.files else f"; {NEEDS_IMPORT}"
        problems.add(path, f"unknown stage kind '{kind}'{guess or ';'} kinds: {', '.join(kinds)}{own}")
        return None
    # the kind is part of the key path: stages.0.distill.tokens
    path = (*path, kind)
    label = _read_label(body, kind, path, problems, kinds)
    if isinstance(body, Mapping):
        # the name belongs to the recipe; the settings dataclass of a stage knows nothing of it
        body = Mapping(body.place, {key: entry for key, entry in body.entries.items() if key != "name"})
    settings = read_settings(body, kinds[kind], path, problems, also=("name",), parts=parts)
    if settings is None:
        return None
    return StageEntry(kind=kind, name=stage_name(index, label), settings=settings, index=index)


def stage_parts(node: Node) -> tuple[str, Node] | None:
    """Return kind and settings of a stage entry (``- kind: settings`` or ``- kind``); None if it has another form."""
    if isinstance(node, Scalar) and isinstance(node.value, str) and not is_null(node):
        # a bare kind has an empty body, so both forms are read alike
        return node.value, Mapping(node.place)
    if isinstance(node, Mapping) and len(node.entries) == 1:
        (kind, entry), *_ = node.entries.items()
        return kind, Mapping(entry.place) if is_null(entry.node) else entry.node
    return None


def _shape_message(node: Node, kinds: Collection[str]) -> str:
    if isinstance(node, Mapping) and node.entries:
        kind = next((key for key in node.entries if key in kinds), None)
        others = [key for key in node.entries if key != kind]
        remedy = f"indent {', '.join(others)} below '{kind}:'" if kind else f"write them below one of {', '.join(kinds)}"
        return f"a stage is one key, its kind, with its settings below it; got the keys {', '.join(node.entries)}: {remedy}"
    return f"a stage is '- kind' or '- kind: {{settings}}', kind one of {', '.join(kinds)}; got {shown_value(node)}"


def _read_label(body: Node, kind: str, path: KeyPath, problems: Problems, kinds: Collection[str]) -> str:
    """Return the stage's ``name``, or its kind."""
    entry: Entry | None = body.entries.get("name") if isinstance(body, Mapping) else None
    if entry is None or is_null(entry.node):
        return kind
    value = entry.node.value if isinstance(entry.node, Scalar) else entry.node
    # the whole text must match, and it names a folder: no slash, no leading dot
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        problems.add((*path, "name"), f"{shown_value(value)} cannot name a stage; {_NAME_RULE}")
    elif value.isdigit():
        problems.add((*path, "name"), f"{shown_value(value)} would be taken for a position in overrides; begin with a letter")
    elif value in kinds and value != kind:
        problems.add((*path, "name"), f"{shown_value(value)} is another kind of stage; choose a name other than {', '.join(kinds)}")
    else:
        return value
    return kind


def _check_labels(stages: Sequence[StageEntry | None], root: Node, problems: Problems) -> None:
    """Check that the stages' names are unique, so that an override means one stage."""
    first: dict[str, StageEntry] = {}
    for entry in stages:
        # stages without a name of their own may share a kind: their folders differ by number
        if entry is None or entry.label == entry.kind:
            continue
        earlier = first.setdefault(entry.label, entry)
        if earlier is not entry:
            place = place_of(root, ("stages", earlier.index, earlier.kind, "name"))
            at = f"stages.{earlier.index}" + (f" ({place})" if place else "")
            problems.add(("stages", entry.index, entry.kind, "name"), f"'{entry.label}' is already the name of {at}; names are unique")
