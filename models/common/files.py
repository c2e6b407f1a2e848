"""Files and folders that are there whole or not at all, and readable messages when a disk says no.

Everything is written under a temporary name beside its place, fsynced and renamed: a crash or a full disk leaves the old thing
untouched. The temporary's name carries host and process id, so that the next start can tell a dead process's leftovers from work
in progress (``clean_leftovers``). A rename within one folder never crosses file systems, which is where "atomic" saves that stage
in $TMPDIR lose both the old and the new file.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EFBIG: ("a file-size limit was reached", "raise the limit (ulimit -f) or choose another file system"),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written"),
    errno.EACCES: ("permission was denied", "choose a folder that you may write, or mend its permissions"),
    errno.EPERM: ("permission was denied", "choose a folder that you may write, or mend its permissions"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("links lead in a circle", "choose another folder"),
    errno.EIO: ("the disk failed to read or write", "look at its health and choose another one"),
    errno.ENOTDIR: ("a file is in the way where a folder should be", "move that file or choose another folder"),
}
# Rust libraries (safetensors, tokenizers) give the errno only inside their message.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
# Temporaries that this very process is still writing: a container's restart reuses process ids, so the id alone proves nothing.
_active: set[str] = set()


def disk_reason(error: BaseException) -> tuple[str, str] | None:
    """(what a disk that refuses says, the remedy), or None when ``error`` is something else."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST_ERRNO.search(str(error))):
        number = int(found.group(1))
    return None if number is None else _REASONS.get(number)


def storage_error(error: BaseException, path: Path, doing: str) -> UserError | None:
    """The readable form of a disk that refuses (full, quota, read-only, permission), or None when ``error`` is something else."""
    found = disk_reason(error)
    if found is None:
        return None
    reason, remedy = found
    return UserError(f"cannot {doing} {path}: {reason}; {remedy}. Nothing half-written was left behind.")


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(handle)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            file = Path(folder, name)
            if not file.is_symlink():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _fsync_folder(Path(folder))


def _make_parents(folder: Path, doing: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        way = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), folder)
        what = "a file where a folder should be" if way.exists() else "a link that leads nowhere"
        raise UserError(f"cannot {doing}: {way} is {what}; move it or choose another folder") from error
    except OSError as error:
        raise (storage_error(error, folder, "create the folder") or error) from error


@contextmanager
def _staged(target: Path, doing: str) -> Iterator[Path]:
    """A temporary beside ``target`` that is removed on any exception; a refusing disk becomes a ``UserError``."""
    _make_parents(target.parent, f"{doing} {target}")
    temporary = _temporary(target)
    _active.add(temporary.name)
    try:
        yield temporary
    except BaseException as error:
        with suppress(OSError):
            _remove(temporary)
        readable = None if isinstance(error, UserError) else storage_error(error, target, doing)
        if readable is not None:
            raise readable from error
        raise
    finally:
        _active.discard(temporary.name)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on success it becomes ``target`` (fsynced, renamed), on any exception it is gone.

    Raises:
        UserError: ``target`` exists already, or the disk refuses (full, quota, read-only, a file in the way).
    """
    target = Path(target)
    taken = UserError(f"{target} exists already and is never overwritten; remove it or choose another folder")
    if os.path.lexists(target):
        raise taken
    with _staged(target, "write") as temporary:
        temporary.mkdir()
        yield temporary
        _fsync_tree(temporary)
        if os.path.lexists(target):
            raise taken
        try:
            temporary.rename(target)
        except OSError as error:
            raise (taken if os.path.lexists(target) else error) from error
        _fsync_folder(target.parent)


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` for work on the way to it; it is gone afterwards, and ``clean_leftovers`` knows it.

    Raises:
        UserError: the disk refuses (full, quota, read-only, a file in the way).
    """
    with _staged(Path(target), "work on") as temporary:
        temporary.mkdir()
        yield temporary
        _remove(temporary)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) in one step; the old file stays whole when that fails."""
    path = Path(path)
    with _staged(path, "write") as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)


def finite(obj: Any) -> Any:
    """The same data with NaN and infinities as None: JSON has no spelling for them that every reader accepts."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: finite(value) for key, value in obj.items()}
    return [finite(value) for value in obj] if isinstance(obj, list | tuple) else obj


def write_json_atomic(path: Path, obj: Any) -> None:
    """Replace ``path`` by ``obj`` as indented JSON in one step; NaN and infinities become null."""
    write_text_atomic(path, json.dumps(finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, obj: Any) -> None:
    """Append ``obj`` as one JSON line and flush it; NaN and infinities become null. A torn last line (a kill) is closed first."""
    line = json.dumps(finite(obj), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        with Path(path).open("ab+") as handle:
            if handle.tell() > 0:
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":
                    line = b"\n" + line
            handle.write(line)
    except OSError as error:
        raise (storage_error(error, Path(path), "append to") or error) from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(obj: Any) -> str:
    """Hex sha256 of the canonical JSON of ``obj``: sorted keys, no spaces, UTF-8; NaN and infinities are a ``ValueError``."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def clean_leftovers(parent: Path) -> list[Path]:
    """Remove the temporaries that killed processes of this host left in ``parent``; returns what was removed.

    Those of other hosts (a shared file system) and of living processes stay.
    """
    if not Path(parent).is_dir():
        return []
    ours = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{8}}\.tmp")
    removed = []
    for path in sorted(Path(parent).iterdir()):
        if (match := ours.fullmatch(path.name)) and path.name not in _active:
            pid = int(match.group(1))
            if pid == os.getpid() or not _alive(pid):
                _remove(path)
                removed.append(path)
    return removed


def check_writable_folder(path: Path, what: str) -> None:
    """Create ``path`` with its parents and write, fsync and remove a probe file in it.

    Raises:
        UserError: naming ``what`` (the recipe key or the folder's role) when a file is in the way, it is read-only or full.
    """
    path = Path(path)
    try:
        _make_parents(path, f"use {path}")
        with _staged(path / "probe", "write") as temporary:
            with temporary.open("wb") as handle:
                handle.write(bytes(4096))
                handle.flush()
                os.fsync(handle.fileno())
            temporary.unlink()
    except (UserError, OSError) as error:
        raise UserError(f"{what} cannot be written: {error}") from error


def check_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Refuse to start writing ``what`` (``needed_bytes``) when the file system of ``path`` has less room.

    Raises:
        UserError: with both numbers.
    """
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{what} needs {needed_bytes:,} bytes, but {path} has {free:,} bytes free; free some space or choose another folder"
        )
