"""Tokenizing that was cut short goes on where it was: the stream, and how much of it is whole, in a folder beside the cache entry.

    <fingerprint>.unfinished/stream         int32 token ids
    <fingerprint>.unfinished/bounds         int64 end of each document; hashes: uint64 of each document's text
    <fingerprint>.unfinished/progress.json  documents and tokens that are surely on disk; written every minute, last

Text that streams from a hub, or fills a disk, takes hours to tokenize; without this a kill would lose them all.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

from ...models.common.files import write_json_atomic

SAVE_SECONDS = 60.0
"""A kill loses at most this much work."""
_KEPT_SECONDS = 7 * 24 * 3600
_ENDING = ".unfinished"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unfinished:
    """A stream of tokens that grows on disk.

    Args:
        folder: Its own; what an earlier process left there is continued.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bounds, self.hashes = array("q", [0]), array("Q")
        self.notes: Counter[str] = Counter()
        """What was found in the documents, by name; goes on with them."""
        self._saved = 0
        self._at = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._continue()
        self._file = (folder / "stream").open("r+b" if self.bounds[-1] else "wb")
        self._file.truncate(self.bounds[-1] * 4)
        self._file.seek(0, os.SEEK_END)

    @property
    def stream(self) -> Path:
        """The tokens."""
        return self.folder / "stream"

    def _continue(self) -> None:
        """Take over the documents that are surely on disk; anything doubtful means from the start."""
        try:
            progress = json.loads((self.folder / "progress.json").read_text())
            documents, tokens = int(progress["documents"]), int(progress["tokens"])
            ends, hashes = array("q"), array("Q")
            for name, numbers in (("bounds", ends), ("hashes", hashes)):
                with (self.folder / name).open("rb") as file:
                    numbers.fromfile(file, documents)
            notes = Counter({str(name): int(count) for name, count in progress.get("notes", {}).items()})
            whole = (not documents or ends[-1] == tokens) and self.stream.stat().st_size >= tokens * 4
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, OverflowError, MemoryError):
            return
        if whole:
            self.bounds.extend(ends)
            self.hashes, self._saved, self.notes = hashes, documents, notes

    def write(self, ids: array) -> None:
        """Append token ids (int32)."""
        self._file.write(ids)

    def save(self, *, now: bool = False) -> None:
        """Make sure of all whole documents, if a minute has passed since the last time."""
        if not now and time.monotonic() - self._at < SAVE_SECONDS:
            return
        self._sync(self._file)
        for name, numbers in (("bounds", self.bounds[1:]), ("hashes", self.hashes)):
            with (self.folder / name).open("r+b" if self._saved else "wb") as file:
                file.seek(self._saved * 8)
                file.truncate()
                file.write(numbers[self._saved :])
                self._sync(file)
        write_json_atomic(
            self.folder / "progress.json", {"documents": len(self.hashes), "tokens": self.bounds[-1], "notes": dict(self.notes)}
        )
        self._saved, self._at = len(self.hashes), time.monotonic()

    @staticmethod
    def _sync(file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())

    def close(self) -> None:
        """Nothing more will be written."""
        self._file.close()


@contextmanager
def unfinished(target: Path, spare: Path) -> Iterator[Unfinished]:
    """The unfinished stream of the cache entry ``target``; gone afterwards, unless the work was cut short and is worth going on with.

    Args:
        target: The entry.
        spare: Folder for the stream while another process works on the same entry.
    """
    folder = target.with_name(target.name + _ENDING)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _forget_old(folder)
    with target.with_name(target.name + ".lock").open("w") as lock:
        alone = _locked(lock)
        kept = False
        try:
            with closing(Unfinished(folder if alone else spare)) as work:
                yield work
        except BaseException as error:
            kept = alone and (folder / "progress.json").exists() and not _is_full(error)
            raise
        finally:
            # while the lock is still held
            if not kept:
                shutil.rmtree(folder if alone else spare, ignore_errors=True)
            if alone:
                Path(lock.name).unlink(missing_ok=True)


def _locked(lock: IO[str]) -> bool:
    """Whether this process alone has the lock, and the file is still the one that others see."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), Path(lock.name).stat())
    except OSError:
        return False


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


def _forget_old(own: Path) -> None:
    """Remove what nobody came back for in a week."""
    for folder in own.parent.glob(f"*{_ENDING}"):
        file = folder / "progress.json"
        if folder != own and file.exists() and time.time() - file.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
