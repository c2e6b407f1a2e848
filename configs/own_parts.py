"""Runs the files that a recipe imports, and checks what they register (``decoct.parts``).

Everything that is wrong with a file is one message with its file and line. A file runs once per process and content.
"""

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from .. import choices, types_of
from ..losses.settings import DIVERGENCES
from ..models.common.errors import UserError
from ..parts import MARK, Kind, Part, Registered, collecting
from ..trainer.settings import DataSettings
from ..trainer.stages.registry import STAGE_KINDS
from .nodes import Listing, Mapping, Node, Scalar, is_null
from .own_settings import PartFaultError, options_of, settings_for

Tell = Callable[[Path], None]
"""Called with a file before it runs."""
MAX_BYTES = 1_000_000
_NAME = re.compile("[A-Za-z][A-Za-z0-9_-]{0,63}")
_BUILT_IN: dict[Kind, Iterable[str]] = {
    "divergence": DIVERGENCES,
    "data source": choices(types_of(DataSettings)["builtin"]),
    "stage": STAGE_KINDS,
    "callback": (),
}
NEEDS_IMPORT = "a part of your own needs import: FILE.py"
"""What a message adds about a name that resembles none of decoct's, in a recipe that imports nothing."""
_USE = 'decorate a function or class with parts.divergence("NAME"), data_source, stage or callback (from decoct import parts)'


@dataclass(frozen=True, kw_only=True)
class PartsFile:
    """One imported file, as it was run."""

    path: str
    """As messages and recipes name it; a relative path is relative to the working directory."""
    sha256: str
    source: bytes = field(repr=False, compare=False)
    """The bytes that were run, for the copy in the run folder."""
    parts: tuple[tuple[Part, type], ...] = field(repr=False, compare=False)
    """What it registers, each with the settings dataclass that was made for it."""

    @property
    def copy_name(self) -> str:
        """Name of its copy in the run folder, which tells apart what it held at different times."""
        stem, mark = Path(self.path).stem, f"-{self.sha256[:8]}"
        return f"{stem.removesuffix(mark)}{mark}.py"

    def words(self) -> str:
        """The file and what it registers, for the plan."""
        found = ", ".join(f"{part.kind} {part.name}" for part, _ in self.parts)
        return f"{self.path} (sha256 {self.sha256[:8]}): {found}"


@dataclass(frozen=True)
class OwnParts:
    """All parts that a recipe imports."""

    files: tuple[PartsFile, ...] = ()

    def settings(self, kind: Kind, name: str) -> type | None:
        """The settings dataclass of the part of this name; None if there is none."""
        return next((made for part, made in self._all() if (part.kind, part.name) == (kind, name)), None)

    def names(self, kind: Kind) -> list[str]:
        """Names of all parts of a kind, in the order of the files."""
        return [part.name for part, _ in self._all() if part.kind == kind]

    def _all(self) -> list[tuple[Part, type]]:
        return [entry for file in self.files for entry in file.parts]


_loaded: dict[tuple[str, str], PartsFile] = {}
"""(path, sha256) -> a file that ran in this process."""


def load_parts(root: Node, folder: Path, tell: Tell | None = None, *, overridden: Container[str] = ()) -> OwnParts:
    """Run the files of the recipe's key ``import``.

    Args:
        root: Tree of the recipe.
        folder: The recipe's folder, to which its paths are relative.
        tell: Called before a file runs that this process has not run yet.
        overridden: Places of overrides, whose paths are relative to the working directory.

    Raises:
        UserError: a file is missing, no Python, raises, or registers nothing, a name twice, or a name of decoct's.
    """
    entry = root.entries.get("import") if isinstance(root, Mapping) else None
    if entry is None or is_null(entry.node):
        return OwnParts()
    items = entry.node.items if isinstance(entry.node, Listing) else [entry.node]
    files: list[PartsFile] = []
    for item in items:
        if not isinstance(item, Scalar) or not isinstance(item.value, str) or is_null(item):
            raise UserError(f"{_before(item.place)}import: must be a Python file or a list of them, such as import: my_parts.py")
        base, base_words = (Path(), "the working directory") if item.place in overridden else (folder, "the recipe's folder")
        # without "..", so that messages show a short path
        file = _run_file(Path(os.path.normpath(base / item.value)), item.place, tell, base_words)
        # a file that is named twice is one file, and registers its names once
        if file not in files:
            files.append(file)
    _check_names(files)
    return OwnParts(tuple(files))


def _before(place: str) -> str:
    return f"{place}: " if place else ""


def _run_file(path: Path, place: str, tell: Tell | None, base: str) -> PartsFile:
    at = f"{_before(place)}import: "
    if path.suffix != ".py":
        raise UserError(f"{at}{path} is no Python file; give one whose name ends in .py")
    # read once: what is hashed, run and copied into the run folder are the same bytes, even if the file changes meanwhile
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{at}there is no file {path}; the path is relative to {base}") from None
    except OSError as error:
        raise UserError(f"{at}{path} cannot be read ({error.strerror}); give a Python file") from None
    if len(source) > MAX_BYTES:
        raise UserError(f"{at}{path} is larger than {MAX_BYTES:,} bytes; import what it needs from installed packages")
    # the content is part of the key, so a file that was edited runs again in a notebook
    key = (str(path.absolute()), hashlib.sha256(source).hexdigest())
    if key not in _loaded:
        if tell is not None:
            tell(path)
        found = _executed(path, source, key[1])
        _loaded[key] = PartsFile(path=str(path), sha256=key[1], source=source, parts=_checked(path, key[1], found))
    # the same file may be named by another path than before
    known = _loaded[key]
    return PartsFile(path=str(path), sha256=known.sha256, source=known.source, parts=known.parts)


def _executed(path: Path, source: bytes, sha256: str) -> list[Registered]:
    """Run a file as a module of its own, and return what it registers."""
    # the hash keeps two versions of a file apart in sys.modules; the stem makes tracebacks readable
    name = f"decoct_parts_{re.sub('[^A-Za-z0-9_]', '_', path.stem)}_{sha256[:8]}"
    module = ModuleType(name)
    module.__file__ = str(path.absolute())
    # by this mark an error is traced to the user's code (``launch/terminal/boundary.py``)
    module.__dict__[MARK] = str(path)
    try:
        # dont_inherit: the ``from __future__`` of this module would otherwise hold in the user's file
        code = compile(source, module.__file__, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: {type(error).__name__}: {error.msg}; the recipe imports this file") from error
    except ValueError as error:
        raise UserError(f"{path}:1: no Python source: {error}; the recipe imports this file") from error
    # dataclasses and annotations of the file are looked up in its module
    sys.modules[name] = module
    try:
        with collecting() as found:
            exec(code, module.__dict__)
    except KeyboardInterrupt:
        del sys.modules[name]
        raise
    # BaseException: a file that calls sys.exit() must not end decoct without a message
    except BaseException as error:
        del sys.modules[name]
        raise UserError(f"{path}:{_line_of(error, module.__file__)}: {_words(error)}; the recipe imports this file") from error
    return found


def _line_of(error: BaseException, file: str) -> int:
    """The last line of ``file`` that the error passed through."""
    # frames below this file's are those of its libraries; the user looks for the line in the own file
    lines = [frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else 1


def _words(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _checked(path: Path, sha256: str, found: Sequence[Registered]) -> tuple[tuple[Part, type], ...]:
    """The parts of a file with their settings; UserError with everything that is wrong with them."""
    if not found:
        raise UserError(f"{path}:1: registers no part; {_USE}")
    made: list[tuple[Part, type]] = []
    faults: list[str] = []
    # all faults are collected, so that one run of the verb shows them all
    for one in found:
        at = f"{path}:{one.line}"
        if callable(one.name):
            decorator, given = f"parts.{one.kind.replace(' ', '_')}", getattr(one.name, "__name__", "NAME")
            faults.append(f'{at}: {decorator} takes the name: @{decorator}("{given}")')
            continue
        if not isinstance(one.name, str) or not _NAME.fullmatch(one.name):
            faults.append(f"{at}: {one.name!r} cannot name a {one.kind}; use letters, digits, '_' and '-', a letter first")
            continue
        if one.name in _BUILT_IN[one.kind]:
            faults.append(f"{at}: {one.name} is a {one.kind} of decoct; choose another name")
            continue
        try:
            options = options_of(one.kind, one.target, one.settings)
        except PartFaultError as error:
            faults.append(f"{at}: {one.kind} {one.name} {error}")
            continue
        part = Part(
            kind=one.kind,
            name=one.name,
            target=one.target,
            place=at,
            file=path.name,
            sha256=sha256,
            options=tuple(name for name, _, _ in options),
            settings=one.settings,
            makes_model=one.makes_model,
            reads_text=one.reads_text,
        )
        made.append((part, settings_for(part, options)))
    _raise(faults)
    return tuple(made)


def _check_names(files: Sequence[PartsFile]) -> None:
    """UserError if a name is registered twice, in one file or in two."""
    first: dict[tuple[Kind, str], Part] = {}
    faults: list[str] = []
    # over all files at once: two files may each be right, and clash only together
    for part, _ in (entry for file in files for entry in file.parts):
        earlier = first.setdefault((part.kind, part.name), part)
        if earlier is not part:
            faults.append(f"{part.place}: the {part.kind} {part.name} is registered twice, first at {earlier.place}; rename one")
    _raise(faults)


def _raise(faults: Sequence[str]) -> None:
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError(f"the imported files have {len(faults)} problems:" + "".join(f"\n  {fault}" for fault in faults))
