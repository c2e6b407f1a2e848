"""decoct.json: what decoct knows of a folder that it wrote, and whether the folder still is what was written.

Whoever opens a folder checks it here (``check_record``): the record itself, and sizes and sha256 of the files, which a cache by file
identity makes cheap. ``verify_folder_files`` reads every byte and names everything that is wrong.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import sha256_file, storage_error, write_json_atomic
from ..common.hash_cache import cached_sha256
from ..common.json_file import read_json
from ..common.seal import seal_is_broken, sealed
from .codes_file import CODES, OLD_CODES

RECORD = "decoct.json"
FORMAT = 1
CONTENT = (
    "config.json", "*.safetensors", CODES, "*.safetensors.index.json", "*.gguf", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "*.tiktoken", "chat_template.jinja",
)  # fmt: skip
"""The files that decide what numbers a folder gives: README, decoct.json and generation settings do not."""
_WEIGHTS = (".safetensors", ".gguf")
_TYPES: dict[str, tuple[type, ...]] = {
    "files": (dict,), "sizes": (dict,), "quant": (dict, type(None)), "export": (dict,), "training": (dict,),
    "metrics": (dict, type(None)), "kept": (dict,), "base_model": (str, type(None)), "run": (str, type(None)), "kind": (str,),
}  # fmt: skip
_EXPORT_TYPES: dict[str, tuple[type, ...]] = {
    "weights": (dict, type(None)), "scales": (dict, type(None)), "format": (str, type(None)), "runtimes": (dict, type(None)),
}  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """The content of decoct.json; {} when the folder has none.

    Raises:
        UserError: it is broken, not what was written, or of a newer format than this version reads.
    """
    file = Path(path) / RECORD
    if not file.exists():
        return {}
    record = read_json(file)
    if seal_is_broken(record):
        raise UserError(
            f"{file} is not what decoct wrote (the sha256 that it keeps of itself differs); make or fetch the folder again "
            f"(a change of your own: 'decoct verify {file.parent} --accept {RECORD}' records it)"
        )
    version = record.get("format")
    if type(version) is not int or version < 1 or not _is_well_formed(record):
        raise UserError(f"{file} is not a record that decoct wrote; remove it to treat the folder as a plain model, or make it again")
    if version > FORMAT:
        raise UserError(f"{file} has format {version}, this version of decoct reads up to {FORMAT}; upgrade decoct")
    return record


def _is_well_formed(record: Mapping[str, Any]) -> bool:
    export = record.get("export", {})
    return (
        all(isinstance(record[key], kinds) for key, kinds in _TYPES.items() if key in record)
        and all(isinstance(export[key], kinds) for key, kinds in _EXPORT_TYPES.items() if key in export)
        and all(name.isprintable() for name in record.get("files", {}))
    )


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write decoct.json: ``content``, the format, size and sha256 of every other file of the folder, and a hash of itself."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / RECORD]
    names = {file.relative_to(folder).as_posix(): file for file in files}
    own = {key: value for key, value in content.items() if key not in ("format", "files", "sizes")}
    hashes = {name: sha256_file(file) for name, file in names.items()}
    sizes = {name: file.stat().st_size for name, file in names.items()}
    seal_record(folder, {"format": FORMAT, **own, "files": hashes, "sizes": sizes})


def seal_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write exactly ``record`` as decoct.json, with a hash of itself."""
    write_json_atomic(folder / RECORD, sealed(record))


def check_record(folder: Path, *, weights: bool = True) -> None:
    """Check a folder against its record, if it has one, before it is used; README files may differ.

    Of the processes of a machine the first one looks, and the others end with it.

    Args:
        folder: Model folder, export, or any other that ``write_record`` was called for.
        weights: Hash weight files too. False: their sizes alone, for who reads config or tokenizer.

    Raises:
        UserError: the record is damaged, or a file is missing or not the one that was written.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    record = read_record(folder)
    for name in record.get("files", {}):
        # model cards are edited by hand; codes may be left out, as only an export needs them
        if name.endswith(".md") or (name in (CODES, OLD_CODES) and not (Path(folder) / name).is_file()):
            continue
        hashing = cached_sha256 if weights or not name.endswith(_WEIGHTS) else None
        problem = _problem(Path(folder), name, record, hashing)
        if problem is not None:
            said = f"{Path(folder) / problem}; it is not what was measured: make or fetch the folder again"
            raise UserError(said + _yours(folder, name))


def _yours(folder: Path, name: str) -> str:
    """How a change that was meant is recorded; nothing for weights, which are what was measured."""
    return "" if name.endswith(_WEIGHTS) else f" (a change of your own: 'decoct verify {folder} --accept {name}' records it)"


def verify_folder_files(path: Path) -> list[str]:
    """Compare every byte of every file with the record; returns the problems, [] when the folder is whole."""
    path = Path(path)
    record = read_record(path)
    files = record.get("files")
    if not files:
        return [f"{path / RECORD} is missing or lists no files, so nothing can be compared"]
    problems = [problem for name in files if (problem := _problem(path, name, record, sha256_file)) is not None]
    unlisted = {file.relative_to(path).as_posix() for pattern in CONTENT for file in path.glob(pattern)} - files.keys()
    return problems + [f"{name} was added after the folder was written{_yours(path, name)}" for name in sorted(unlisted)]


def accept_changes(folder: Path, names: Sequence[str]) -> None:
    """Take files as they are now into the record, after an edit that was meant; the record itself by its own name.

    A file that was added (a chat template, say) is listed from then on.

    Raises:
        UserError: the folder has no record, a name is not a file in it, or it is a weight file: those are what was measured.
    """
    file = Path(folder) / RECORD
    record = read_json(file)
    files, sizes = dict(record.get("files") or {}), dict(record.get("sizes") or {})
    for name in names:
        if name == RECORD:
            continue
        if name.endswith(_WEIGHTS):
            raise UserError(f"{name} holds weights, and the record says what was measured of them; make the folder again")
        if Path(name).is_absolute() or ".." in Path(name).parts or not (Path(folder) / name).is_file():
            raise UserError(f"{name} is not a file that is in {folder}; {file} lists {', '.join(sorted(files))}")
        files[name], sizes[name] = sha256_file(Path(folder) / name), (Path(folder) / name).stat().st_size
    if RECORD not in names:
        read_record(Path(folder))
    seal_record(Path(folder), {**record, "files": files, "sizes": sizes})


def _problem(folder: Path, name: str, record: Mapping[str, Any], hashing: Callable[[Path], str] | None) -> str | None:
    """What is wrong with a recorded file; None when nothing is."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{name}: the record names a file outside the folder"
    file, size = folder / name, record.get("sizes", {}).get(name)
    try:
        if not file.is_file():
            return f"{name} is missing"
        if size is not None and file.stat().st_size != size:
            return f"{name} has changed since it was written ({file.stat().st_size:,} bytes instead of {size!r:.40})"
        if hashing is not None and hashing(file) != record["files"][name]:
            return f"{name} has changed since it was written (its sha256 differs from {RECORD})"
    except OSError as error:
        raise storage_error(error, file, "read") or UserError(f"{file} cannot be read: {error.strerror or error}") from error
    return None
