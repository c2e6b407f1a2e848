"""sha256 of large files, remembered by what the file system says of them, so that a folder can be checked each time it is opened.

An entry ``<cache>/hashes/<device>-<inode>`` holds for as long as the file has the same size, mtime and ctime (nanoseconds). Every write
through the file system changes them; a disk that loses bits by itself does not: ``decoct verify`` reads every byte for that reason.
Entries are replaced in one step and carry a checksum, so that processes may share the folder and a damaged entry is as good as none.
"""

import hashlib
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from .cache_folder import cache_folder

SMALL = 2**20
"""Files below these bytes are hashed each time: looking up would cost as much."""
SETTLED_SECONDS = 2.0
"""A file changed more recently is not remembered: clocks of file systems tick, and a second write in the same tick would not show."""


def cached_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, from the cache where the file is the one that was hashed before.

    Raises:
        OSError: the file cannot be read. A cache that cannot be read or written is done without.
    """
    with Path(path).open("rb") as handle:
        before = os.fstat(handle.fileno())
        if before.st_size < SMALL:
            return hashlib.file_digest(handle, "sha256").hexdigest()
        entry = cache_folder() / "hashes" / f"{before.st_dev:x}-{before.st_ino:x}"
        known = _read(entry, before)
        if known is not None:
            return known
        started = time.time_ns()
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        after = os.fstat(handle.fileno())
    changed = max(before.st_mtime_ns, before.st_ctime_ns)
    if _identity(after) == _identity(before) and started - changed > SETTLED_SECONDS * 1e9:
        _write(entry, before, digest)
    return digest


def _identity(stat: os.stat_result) -> str:
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _line(stat: os.stat_result, digest: str) -> str:
    text = f"{_identity(stat)} {digest}"
    return f"{text} {hashlib.sha256(text.encode()).hexdigest()[:16]}\n"


def _read(entry: Path, stat: os.stat_result) -> str | None:
    try:
        text = entry.read_text(encoding="ascii")
        digest = text.split(" ")[5]
    except (OSError, ValueError, IndexError):
        return None
    return digest if text == _line(stat, digest) else None


def _write(entry: Path, stat: os.stat_result, digest: str) -> None:
    temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}.tmp")
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(_line(stat, digest), encoding="ascii")
            temporary.replace(entry)
        finally:
            temporary.unlink(missing_ok=True)
