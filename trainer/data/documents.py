"""Reads the documents of a run (the standard library, local files, the hub, a source of the user's), as often as needed, one at a time."""

import hashlib
import itertools
import os
import platform
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from ...models.common.hash_cache import cached_sha256
from ...parts import Part, PartError
from ..settings import DataSettings
from .conversations import COLUMNS
from .file_documents import read_file
from .file_rows import Row, read_rows
from .hub import check_columns, load_hub, named, rows_in, texts_in
from .input_files import PLAIN, ROWS, file_kind, find_files, shown_path, suffix_of
from .pieces import Unit
from .units import shards_of, units_of

if TYPE_CHECKING:
    import datasets

STDLIB_BYTES = 8_000_000
"""Largest size of the python-stdlib text: whole files, in order, as long as they fit."""
# folders that differ between installations of the same Python, or whose files are written to be odd
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Documents:
    """Texts in a fixed order, without blank ones. Each iteration reads them from the start."""

    description: str
    """Description of the text for messages."""
    fingerprint: str
    """sha256 of everything that decides the documents; the same text (on the hub: the same revision) has the same on every machine."""
    open: Callable[[], Iterable[str]] = field(repr=False, compare=False)
    """Starts reading texts."""
    chats: "Callable[[], Iterable[Row]] | None" = field(default=None, repr=False, compare=False)
    """Starts reading conversations, as (place, row or the error that it cannot be read); None = these are texts."""
    passed: Counter[str] = field(default_factory=Counter, repr=False, compare=False)
    """Files that were not read as text, by reason."""
    notes: Counter[str] = field(default_factory=Counter, repr=False, compare=False)
    """What the last iteration left out or replaced, by reason."""
    divide: Callable[[], list[Unit]] | None = field(default=None, repr=False, compare=False)
    """Cuts the text into units that several processes encode (``units.py``); None = it can only be read as one."""

    def __iter__(self) -> Iterator[str]:
        # each iteration counts from zero: the text is read once as a check and once to be tokenized
        self.notes.clear()
        return without_blank(self.open(), self.notes)


def without_blank(texts: Iterable[str], notes: Counter[str]) -> Iterator[str]:
    """The texts that are not blank; the others are counted in ``notes``."""
    for text in texts:
        if text and not text.isspace():
            yield text
        else:
            notes["blank documents"] += 1


def read_documents(settings: DataSettings) -> Documents:
    """The text that ``settings`` names; its first document is read as a check.

    Raises:
        UserError: no file matches, all documents are blank, a suffix is unknown, a field is missing, a file is damaged, or the hub cannot
            be reached. Errors in later documents are raised while iterating.
    """
    if settings.builtin:
        documents = _stdlib_documents(settings.max_documents)
    elif settings.files:
        documents = _file_documents(settings)
    elif settings.part is not None:
        documents = _own_documents(settings, settings.part)
    else:
        documents = _hub_documents(settings)
    # reads the first document, so that most mistakes show before a teacher is loaded
    if next(iter(documents.chats() if documents.chats else documents), None) is None:
        source = next(f"data.{name}" for name in settings.exactly_one if getattr(settings, name))
        raise UserError(f"{source}: {documents.description} holds no text (it is empty or blank); give other data")
    return documents


def _stdlib_documents(limit: int | None) -> Documents:
    root = Path(sysconfig.get_path("stdlib"))
    texts = list(itertools.islice(_stdlib_texts(root, STDLIB_BYTES), limit))
    if not texts:
        raise UserError(f"data.builtin: the standard library of this Python has no .py files in {root}; use data.files")
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        # with its length, so that two ways of cutting the same bytes into files have different hashes
        digest.update(len(data).to_bytes(8, "little") + data)
    return Documents(f"python-stdlib of Python {platform.python_version()} ({len(texts)} files)", digest.hexdigest(), lambda: texts)


def _stdlib_texts(root: Path, most_bytes: int) -> Iterator[str]:
    """The files of ``stdlib_files``, in order, until the next would exceed ``most_bytes``; decoded as Python does."""
    left = most_bytes
    for path in stdlib_files(root):
        left -= path.stat().st_size
        if left < 0:
            return
        try:
            with tokenize.open(str(path)) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            # some distributions add a file that Python itself cannot import
            continue
        yield text


def stdlib_files(root: Path) -> list[Path]:
    """The .py files of a standard library, without installed packages, tests and idlelib, sorted by their path in it."""
    found: list[str] = []
    for folder, inner, files in os.walk(root):
        # in place: os.walk enters the folders that are left in this list
        inner[:] = [name for name in inner if name not in _NOT_STDLIB]
        found += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    # sorted as text with "/" on every system, so that the order is the same everywhere
    return [root / name for name in sorted(found)]


def _file_documents(settings: DataSettings) -> Documents:
    passed: Counter[str] = Counter()
    files = find_files(settings.files or (), passed)
    column = settings.text_field
    fields = {column for file in files if file_kind(file) not in PLAIN}
    facts = {
        "files": [[suffix_of(file), _hash_file(file)] for file in files],
        "text_field": sorted(fields),
        "max_documents": settings.max_documents,
    }
    first, last = shown_path(files[0].name), shown_path(files[-1].name)
    named = first if len(files) == 1 else f"{len(files)} files, {first} to {last}"
    if settings.kind == "chat":
        return _file_chats(settings, files, named, {"files": facts["files"], "max_documents": settings.max_documents}, passed)
    notes: Counter[str] = Counter()

    def read() -> Iterator[str]:
        # a generator: no file is read before its turn, and one document is in memory at a time
        texts = itertools.chain.from_iterable(read_file(file, column, notes) for file in files)
        return itertools.islice(texts, settings.max_documents)

    # where the first documents alone are read, nobody knows in which file they end before all before it are read
    divide = None if settings.max_documents else partial(units_of, files, parts=True)
    return Documents(named + _limited(settings), sha256_json(facts), read, passed=passed, notes=notes, divide=divide)


def _file_chats(settings: DataSettings, files: list[Path], named: str, facts: dict[str, Any], passed: Counter[str]) -> Documents:
    if plain := [file for file in files if file_kind(file) in PLAIN]:
        raise UserError(f"data.files: {shown_path(plain[0])} holds no conversations; data.kind: chat reads rows ({', '.join(ROWS)})")

    def read() -> Iterator[Row]:
        rows = itertools.chain.from_iterable(read_rows(file, COLUMNS, name=shown_path(file.name)) for file in files)
        return itertools.islice(rows, settings.max_documents)

    # a conversation that cannot be used is named by its line, which a part of a file does not know
    divide = None if settings.max_documents else partial(units_of, files, parts=False)
    return Documents(named + _limited(settings), sha256_json({"kind": "chat", **facts}), tuple, read, passed, divide=divide)


def _own_documents(settings: DataSettings, part: Part) -> Documents:
    """What an imported data source gives. The hash is of its file and options: what else it reads must not change."""
    options = {name: getattr(settings, name) for name in part.options}
    facts = {"source": part.key(), "options": options, "kind": settings.kind, "max_documents": settings.max_documents}
    what = f"{part.place}: data source '{part.name}'"
    wanted = dict if settings.kind == "chat" else str

    def read() -> Iterator[Any]:
        found = part.call(options=options)
        if not isinstance(found, Iterable) or isinstance(found, str | Mapping):
            raise PartError(f"{what} must return an iterable of {wanted.__name__}; it returned {type(found).__name__}")
        for number, one in enumerate(itertools.islice(found, settings.max_documents), 1):
            if not isinstance(one, wanted):
                raise PartError(
                    f"{what} gave a {type(one).__name__} as document {number}; with data.kind: {settings.kind} it must be {wanted.__name__}"
                )
            yield one

    named = f"{part.name} of {part.file}" + _limited(settings)
    if settings.kind == "chat":
        return Documents(named, sha256_json(facts), tuple, lambda: ((f"conversation {n}", row) for n, row in enumerate(read(), 1)))
    return Documents(named, sha256_json(facts), read)


def _hash_file(path: Path) -> str:
    try:
        # of an unchanged file from the cache of hashes: a start must not take longer the more text there is
        return cached_sha256(path)
    except OSError as error:
        raise UserError(f"data.files: {shown_path(path)} cannot be read ({error.strerror or error}); check its permissions") from error


def _limited(settings: DataSettings) -> str:
    return f" (first {settings.max_documents:,} documents)" if settings.max_documents else ""


def _hub_documents(settings: DataSettings) -> Documents:
    dataset, revision = load_hub(settings)
    columns = check_columns(dataset, settings)
    facts: dict[str, Any] = {"hub": [settings.hub, settings.hub_config, settings.hub_split, revision]}
    # checked by the settings: shards are read whole
    divide = partial(shards_of, settings, cast("datasets.IterableDataset", dataset).num_shards, revision) if settings.hub_shards else None
    described = named(settings) + _limited(settings)
    if settings.kind == "chat":
        facts |= {"kind": "chat", "max_documents": settings.max_documents}
        rows = partial(rows_in, dataset, columns)
        return Documents(described, sha256_json(facts), tuple, lambda: itertools.islice(rows(), settings.max_documents), divide=divide)
    facts |= {"text_field": settings.text_field, "max_documents": settings.max_documents}
    texts = partial(texts_in, dataset, settings.text_field)
    return Documents(described, sha256_json(facts), lambda: itertools.islice(texts(), settings.max_documents), divide=divide)
