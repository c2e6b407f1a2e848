"""Writes files and folders atomically, so that they are complete or absent, and turns disk errors into readable messages.

Everything is written under a temporary name in the same folder, fsynced and renamed: after a crash or on a full disk the old content is
unchanged. The temporary name contains host and process id, so that the next start can tell leftovers of a dead process from work in
progress (``clean_leftovers``). A rename within one folder never crosses file systems; "atomic" writes by way of $TMPDIR do, and can lose
both the old and the new file.
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
    errno.EACCES: ("permission was denied", "choose a folder that you may write, or change its permissions"),
    errno.EPERM: ("permission was denied", "choose a folder that you may write, or change its permissions"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("links lead in a circle", "choose another folder"),
    errno.EIO: ("the disk failed to read or write", "look at its health and choose another one"),
    errno.ENOTDIR: ("a file is in the way where a folder should be", "move that file or choose another folder"),
}
# Rust libraries (safetensors, tokenizers) give the errno only inside their message.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
# Temporaries that this process is still writing. The process id in the name is not enough: a restarted container reuses process ids.
_active: set[str] = set()


def disk_reason(error: BaseException) -> tuple[str, str] | None:
    """(reason, remedy) of a disk error (full, quota, read-only, permission), or None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST_ERRNO.search(str(error))):
        number = int(found.group(1))
    return None if number is None else _REASONS.get(number)


def storage_error(error: BaseException, path: Path, doing: str) -> UserError | None:
    """The readable form of a disk error (full, quota, read-only, permission), or None for other errors."""
    found = disk_reason(error)
    if found is None:
        return None
    reason, remedy = found
    return UserError(f"cannot {doing} {path}: {reason}; {remedy}. Nothing half-written was left behind.")


def _temporary(target: Path) -> Path:
    # hidden, in the target's own folder (a rename must not cross file systems), and unique per process and call
    return target.parent / f".{target.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def _remove(path: Path) -> None:
    # a link is removed itself, never what it points to
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems cannot fsync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _fsync_tree(root: Path) -> None:
    # files before their folder: a synced entry must not point to content that a power failure could lose
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
        what = "a file where a folder should be" if way.exists() else "a broken link"
        raise UserError(f"cannot {doing}: {way} is {what}; move it or choose another folder") from error
    except OSError as error:
        raise (storage_error(error, folder, "create the folder") or error) from error


@contextmanager
def _staged(target: Path, doing: str) -> Iterator[Path]:
    """A temporary name next to ``target`` that is removed on any exception; disk errors become a ``UserError``."""
    _make_parents(target.parent, f"{doing} {target}")
    temporary = _temporary(target)
    _active.add(temporary.name)
    try:
        yield temporary
    except BaseException as error:
        # first, because the message promises it; BaseException, because Ctrl-C must not leave it behind either
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
    """Yields an empty folder next to ``target``. On success it becomes ``target`` (fsynced, renamed); on an exception it is removed.

    Raises:
        UserError: ``target`` already exists, or there is a disk error (full, quota, read-only, a file in the way).
    """
    target = Path(target)
    taken = UserError(f"{target} exists already and is never overwritten; remove it or choose another folder")
    # lexists: a broken link is in the way too
    if os.path.lexists(target):
        raise taken
    with _staged(target, "write") as temporary:
        temporary.mkdir()
        yield temporary
        _fsync_tree(temporary)
        # a rename would silently replace an empty folder that was made in the meantime
        if os.path.lexists(target):
            raise taken
        try:
            temporary.rename(target)
        except OSError as error:
            raise (taken if os.path.lexists(target) else error) from error
        _fsync_folder(target.parent)


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """Yields an empty folder next to ``target`` for intermediate work, removed afterwards; ``clean_leftovers`` finds it after a crash.

    Raises:
        UserError: there is a disk error (full, quota, read-only, a file in the way).
    """
    with _staged(Path(target), "work on") as temporary:
        temporary.mkdir()
        yield temporary
        _remove(temporary)


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` (UTF-8) in one step; if that fails the old file is unchanged."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content`` in one step; if that fails the old file is unchanged."""
    path = Path(path)
    with _staged(path, "write") as temporary:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        # replaces atomically: readers see the old file or the new one, never a part
        temporary.replace(path)
        _fsync_folder(path.parent)


def finite(obj: Any) -> Any:
    """The same data with None for NaN and infinities, for which JSON has no form that every reader accepts."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: finite(value) for key, value in obj.items()}
    return [finite(value) for value in obj] if isinstance(obj, list | tuple) else obj


def write_json_atomic(path: Path, obj: Any) -> None:
    """Replaces ``path`` by ``obj`` as indented JSON in one step; NaN and infinities become null."""
    write_text_atomic(path, json.dumps(finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, obj: Any) -> None:
    """Appends ``obj`` as one JSON line; NaN and infinities become null. An incomplete last line (after a kill) is ended first."""
    # bytes, because the last byte of the file is looked at below
    line = json.dumps(finite(obj), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        with Path(path).open("ab+") as handle:
            if handle.tell() > 0:
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":
                    line = b"\n" + line
            # append mode: the line goes to the end, wherever the reads above have left the position
            handle.write(line)
    except OSError as error:
        raise (storage_error(error, Path(path), "append to") or error) from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(obj: Any) -> str:
    """Hex sha256 of the canonical JSON of ``obj``: sorted keys, no spaces, UTF-8. NaN and infinities raise ``ValueError``."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _alive(pid: int) -> bool:
    try:
        # signal 0 checks for the process and sends nothing
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a process of another user, or a number out of range: it may be alive, so its files stay
    except (PermissionError, OverflowError):
        return True
    return True


def clean_leftovers(parent: Path) -> list[Path]:
    """Removes the temporaries that dead processes of this host left in ``parent``; returns the removed paths.

    Temporaries of other hosts (on a shared file system) and of living processes stay.
    """
    if not Path(parent).is_dir():
        return []
    ours = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{8}}\.tmp")
    removed = []
    for path in sorted(Path(parent).iterdir()):
        if (match := ours.fullmatch(path.name)) and path.name not in _active:
            pid = int(match.group(1))
            # our own number, but not in ``_active``: left by a dead process that had the same number
            if pid == os.getpid() or not _alive(pid):
                _remove(path)
                removed.append(path)
    return removed


def check_writable_folder(path: Path, what: str) -> None:
    """Creates ``path`` with its parents, and writes, fsyncs and removes a probe file in it.

    Raises:
        UserError: a file is in the way, or the folder is read-only or full; the message names ``what`` (recipe key or role of the folder).
    """
    path = Path(path)
    try:
        _make_parents(path, f"use {path}")
        with _staged(path / "probe", "write") as temporary:
            with temporary.open("wb") as handle:
                handle.write(bytes(4096))
                handle.flush()
                os.fsync(handle.fileno())
            # inside the block, which would not remove it: it cleans up only after an exception
            temporary.unlink()
    except (UserError, OSError) as error:
        raise UserError(f"{what} cannot be written: {error}") from error


def check_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Checks that the file system of ``path`` has room for ``what`` (``needed_bytes``).

    Raises:
        UserError: it has less room; the message has both numbers.
    """
    # the folder itself may not exist yet
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{what} needs {needed_bytes:,} bytes, but {path} has {free:,} bytes free; free some space or choose another folder"
        )
