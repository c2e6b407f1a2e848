"""Check of a blend: parts that share a source would train on each other's held-out text."""

import itertools
from dataclasses import replace
from pathlib import Path

from ..models.common.errors import UserError
from ..trainer.data.input_files import find_files
from ..trainer.settings_text import BlendPart, labels_of
from .draft import Draft
from .problems import Problems


def check_blend(draft: Draft, problems: Problems) -> None:
    """Add a problem for the first two parts that read the same files, hub dataset, built-in text or generated text."""
    parts = (draft.data.blend if draft.data else None) or ()
    names, files = labels_of(parts), [_files(part) for part in parts]
    for (one, first), (two, second) in itertools.combinations(enumerate(parts), 2):
        both = sorted(files[one] & files[two])
        if both:
            what = f"{both[0]} ({len(both):,} files in all)"
        elif first.hub and _dataset(first) == _dataset(second):
            what = first.hub
        elif first.builtin and first.builtin == second.builtin:
            what = first.builtin
        # a longer text of the same settings begins with the shorter one
        elif first.generate and second.generate and replace(first.generate, tokens=second.generate.tokens) == second.generate:
            what = "the text of the same 'generate'"
        else:
            continue
        problems.add(
            ("data", "blend", two),
            f"reads {what}, as part {one} ({names[one]}) does; each part holds out text for itself, so one would train on what the other "
            "holds out: give each file or dataset to one part",
        )
        return


def _dataset(part: BlendPart) -> tuple[str | None, str, str]:
    # a configuration that is not named is the one of this name
    return part.hub, part.hub_config or "default", part.hub_split


def _files(part: BlendPart) -> set[Path]:
    if not part.files:
        return set()
    try:
        return {file.resolve() for file in find_files(part.files)}
    except (UserError, OSError):
        # files that are not here are told when the text is read; a plan may be made elsewhere
        return set()
