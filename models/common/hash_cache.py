"""Caches the sha256 of large files by their file system attributes, so that a folder can be checked each time it is opened.

An entry ``<cache>/hashes/<device>-<inode>`` is valid as long as the file has the same size, mtime and ctime (nanoseconds). Every write
through the file system changes them; a disk that loses bits by itself does not, so ``decoct verify`` reads every byte. Entries are replaced
in one step and have a checksum, so that processes can share the folder, and a damaged entry is ignored.
"""

import hashlib
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from .cache_folder import cache_folder

SMALL = 2**20
"""Files with fewer bytes are hashed each time: a lookup would take as long."""
SETTLED_SECONDS = 2.0
"""A file that changed more recently is not cached: a second write within the same tick of the file system's clock would not show."""


def cached_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, from the cache if the file is unchanged since it was hashed.

    Raises:
        OSError: the file cannot be read. A cache that cannot be read or written is ignored.
    """
    with Path(path).open("rb") as handle:
        # of the open file, not of the name: a rename in between cannot mix two files
        before = os.fstat(handle.fileno())
        if before.st_size < SMALL:
            return hashlib.file_digest(handle, "sha256").hexdigest()
        entry = cache_folder() / "hashes" / f"{before.st_dev:x}-{before.st_ino:x}"
        known = _read(entry, before)
        if known is not None:
            return known
        # the file must not change while it is hashed, so its attributes are compared before and after
        started = time.time_ns()
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        after = os.fstat(handle.fileno())
    changed = max(before.st_mtime_ns, before.st_ctime_ns)
    # a file written within the last two seconds could change again without a new time stamp
    if _identity(after) == _identity(before) and started - changed > SETTLED_SECONDS * 1e9:
        _write(entry, before, digest)
    return digest


def _identity(stat: os.stat_result) -> str:
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _line(stat: os.stat_result, digest: str) -> str:
    # the checksum detects a damaged entry, whose hash would be that of no file
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
    # a cache that cannot be written costs time alone
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(_line(stat, digest), encoding="ascii")
            temporary.replace(entry)
        finally:
            # gone already after a successful replace
            temporary.unlink(missing_ok=True)
