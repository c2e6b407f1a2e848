"""decoct.json: the record of a folder that decoct wrote, and checks that the folder is unchanged.

Code that opens a folder calls ``check_record``: it checks the record, sizes and sha256 of the files, and is cheap because hashes are
cached by file identity. ``verify_folder_files`` reads every byte and reports every problem.
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
"""Files that determine the numbers of a model; README, decoct.json and generation settings do not."""
_WEIGHTS = (".safetensors", ".gguf")
# a record may have been edited: whatever reads these entries relies on their types
_TYPES: dict[str, tuple[type, ...]] = {
    "imported": (dict,), "files": (dict,), "sizes": (dict,), "quant": (dict, type(None)), "export": (dict,), "training": (dict,),
    "metrics": (dict, type(None)), "kept": (dict,), "parent_shape": (dict,), "root": (dict,), "base_model": (str, type(None)),
    "run": (str, type(None)), "kind": (str,),
}  # fmt: skip
_EXPORT_TYPES: dict[str, tuple[type, ...]] = {
    "weights": (dict, type(None)), "scales": (dict, type(None)), "format": (str, type(None)), "runtimes": (dict, type(None)),
}  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """The content of decoct.json; {} when the folder has none.

    Raises:
        UserError: the record is damaged, was changed, or has a newer format than this version reads.
    """
    file = Path(path) / RECORD
    # a folder of another tool is no error
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
        # names are printed in messages
        and all(name.isprintable() for name in record.get("files", {}))
    )


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write decoct.json: ``content``, the format, size and sha256 of every other file in the folder, and a hash of the record itself."""
    # sorted, so that the same folder gives the same record on every file system
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / RECORD]
    names = {file.relative_to(folder).as_posix(): file for file in files}
    # the content may come from another folder's record, whose hashes do not apply here
    own = {key: value for key, value in content.items() if key not in ("format", "files", "sizes")}
    hashes = {name: sha256_file(file) for name, file in names.items()}
    sizes = {name: file.stat().st_size for name, file in names.items()}
    seal_record(folder, {"format": FORMAT, **own, "files": hashes, "sizes": sizes})


def seal_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` unchanged as decoct.json, with a hash of itself."""
    write_json_atomic(folder / RECORD, sealed(record))


def check_record(folder: Path, *, weights: bool = True) -> None:
    """Check a folder against its record, if it has one, before it is used. Markdown files may differ.

    Only the first process of a machine checks; if it fails, the others stop with it.

    Args:
        folder: Model folder, export, or any other folder with a record.
        weights: Also hash weight files. False checks only their sizes, for callers that read config or tokenizer.

    Raises:
        UserError: the record is damaged, or a file is missing or has changed.
    """
    # one hashing process per machine; the others would read the same bytes from the same disk at the same time
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    record = read_record(folder)
    for name in record.get("files", {}):
        # users edit model cards by hand; codes may be missing, because only an export needs them
        if name.endswith(".md") or (name in (CODES, OLD_CODES) and not (Path(folder) / name).is_file()):
            continue
        hashing = cached_sha256 if weights or not name.endswith(_WEIGHTS) else None
        problem = _problem(Path(folder), name, record, hashing)
        if problem is not None:
            said = f"{Path(folder) / problem}; it is not what was measured: make or fetch the folder again"
            raise UserError(said + _yours(folder, name))


def _yours(folder: Path, name: str) -> str:
    """Hint how to record an intended change; '' for weights, whose figures would no longer hold."""
    return "" if name.endswith(_WEIGHTS) else f" (a change of your own: 'decoct verify {folder} --accept {name}' records it)"


def verify_folder_files(path: Path) -> list[str]:
    """Compare every byte of every file with the record.

    Returns:
        One line per problem; [] when the folder is unchanged.
    """
    path = Path(path)
    record = read_record(path)
    # {} as well: a record that lists nothing proves nothing
    files = record.get("files")
    if not files:
        return [f"{path / RECORD} is missing or lists no files, so nothing can be compared"]
    problems = [problem for name in files if (problem := _problem(path, name, record, sha256_file)) is not None]
    # a new file that determines numbers is a change too, though every listed file is unchanged
    unlisted = {file.relative_to(path).as_posix() for pattern in CONTENT for file in path.glob(pattern)} - files.keys()
    return problems + [f"{name} was added after the folder was written{_yours(path, name)}" for name in sorted(unlisted)]


def accept_changes(folder: Path, names: Sequence[str]) -> None:
    """Record the present content of files after an intended edit. The name decoct.json accepts an edit of the record itself.

    A new file (such as a chat template) is added to the record.

    Raises:
        UserError: the folder has no record, a name is not a file in it, or it is a weight file, whose figures would no longer hold.
    """
    file = Path(folder) / RECORD
    record = read_json(file)
    files, sizes = dict(record.get("files") or {}), dict(record.get("sizes") or {})
    for name in names:
        if name == RECORD:
            continue
        if name.endswith(_WEIGHTS):
            raise UserError(f"{name} holds weights, and the record contains what was measured with them; make the folder again")
        # only files of this folder can be recorded in it
        if Path(name).is_absolute() or ".." in Path(name).parts or not (Path(folder) / name).is_file():
            raise UserError(f"{name} is not a file that is in {folder}; {file} lists {', '.join(sorted(files))}")
        files[name], sizes[name] = sha256_file(Path(folder) / name), (Path(folder) / name).stat().st_size
    # an edited record has a broken seal, which only its own name accepts
    if RECORD not in names:
        read_record(Path(folder))
    seal_record(Path(folder), {**record, "files": files, "sizes": sizes})


def _problem(folder: Path, name: str, record: Mapping[str, Any], hashing: Callable[[Path], str] | None) -> str | None:
    """The problem of a recorded file; None when it is unchanged."""
    # a record is data from elsewhere and may name any path
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{name}: the record names a file outside the folder"
    file, size = folder / name, record.get("sizes", {}).get(name)
    try:
        if not file.is_file():
            return f"{name} is missing"
        # the size first: it is free, and finds truncated downloads without hashing
        if size is not None and file.stat().st_size != size:
            return f"{name} has changed since it was written ({file.stat().st_size:,} bytes instead of {size!r:.40})"
        if hashing is not None and hashing(file) != record["files"][name]:
            return f"{name} has changed since it was written (its sha256 differs from {RECORD})"
    except OSError as error:
        raise storage_error(error, file, "read") or UserError(f"{file} cannot be read: {error.strerror or error}") from error
    return None
