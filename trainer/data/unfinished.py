"""Lets interrupted tokenizing continue: a folder next to the cache entry holds the stream and how much of it is complete.

    <fingerprint>.unfinished/stream         int32 token ids
    <fingerprint>.unfinished/bounds         int64 end of each document; hashes: uint64 of each document's text
    <fingerprint>.unfinished/progress.json  documents and tokens that are certainly on disk; written every minute, after the others

Large texts take hours to tokenize; without this a kill would lose all of the work.
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
"""Time between two saves: a kill loses at most this much work."""
# long enough for a machine that is repaired or a queue that is full, short enough that abandoned streams do not fill the cache
_KEPT_SECONDS = 7 * 24 * 3600
_ENDING = ".unfinished"
UNITS_ENDING = ".units"
"""Ends the name of a folder of units (``shared_text.py``)."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unfinished:
    """A stream of tokens that grows on disk.

    Args:
        folder: Folder of this stream; the stream that an earlier process left there is continued.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bounds, self.hashes = array("q", [0]), array("Q")
        self.notes: Counter[str] = Counter()
        """Counts of findings in the documents, by name; saved and continued with them."""
        self._saved = 0
        self._at = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        # sets ``bounds``, which decides below how much of the stream is kept
        self._continue()
        self._file = (folder / "stream").open("r+b" if self.bounds[-1] else "wb")
        # tokens after the last saved document may be incomplete: they are written again
        self._file.truncate(self.bounds[-1] * 4)
        self._file.seek(0, os.SEEK_END)

    @property
    def stream(self) -> Path:
        """The file of tokens."""
        return self.folder / "stream"

    def _continue(self) -> None:
        """Loads the documents that are certainly on disk; starts from the beginning if anything is inconsistent."""
        try:
            progress = json.loads((self.folder / "progress.json").read_text())
            documents, tokens = int(progress["documents"]), int(progress["tokens"])
            # both arrays have one number per document; the files may be longer, after a kill between two writes
            ends, hashes = array("q"), array("Q")
            for name, numbers in (("bounds", ends), ("hashes", hashes)):
                with (self.folder / name).open("rb") as file:
                    numbers.fromfile(file, documents)
            notes = Counter({str(name): int(count) for name, count in progress.get("notes", {}).items()})
            # the parts must agree with each other: a stream that is too short, or other bounds, would shift every later token
            whole = (not documents or ends[-1] == tokens) and self.stream.stat().st_size >= tokens * 4
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, OverflowError, MemoryError):
            return
        if whole:
            self.bounds.extend(ends)
            self.hashes, self._saved, self.notes = hashes, documents, notes

    def write(self, ids: "array[int] | memoryview") -> None:
        """Appends token ids (int32)."""
        self._file.write(ids)

    def save(self, *, now: bool = False) -> None:
        """Saves all complete documents, if a minute has passed since the last time."""
        if not now and time.monotonic() - self._at < SAVE_SECONDS:
            return
        # the tokens first and progress.json last, so that it never counts documents that are not on disk
        self._sync(self._file)
        for name, numbers in (("bounds", self.bounds[1:]), ("hashes", self.hashes)):
            with (self.folder / name).open("r+b" if self._saved else "wb") as file:
                # appends what is new and cuts what a kill has left behind it; 8 bytes per number
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
        """Closes the stream."""
        self._file.close()


@contextmanager
def unfinished(target: Path, spare: Path) -> Iterator[Unfinished]:
    """Opens the unfinished stream of the cache entry ``target``. It is removed afterwards, unless it was interrupted after a save.

    Args:
        target: The entry.
        spare: Folder for the stream while another process works on the same entry.
    """
    folder = target.with_name(target.name + _ENDING)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # here, because a user who starts with a new text may never continue the old one
    forget_old(folder)
    # flock belongs to the open file, so the kernel releases it when the process dies, however it dies
    with target.with_name(target.name + ".lock").open("w") as lock:
        alone = _locked(lock)
        kept = False
        try:
            with closing(Unfinished(folder if alone else spare)) as work:
                yield work
        except BaseException as error:
            # on a full disk the stream itself takes the space that a next start needs
            kept = alone and (folder / "progress.json").exists() and not _is_full(error)
            raise
        finally:
            # removed while the lock is still held, so that no other process opens it in between
            if not kept:
                shutil.rmtree(folder if alone else spare, ignore_errors=True)
            if alone:
                # while still locked; a process that has opened the same file finds in ``_locked`` that its name is gone, and works in the
                # spare folder
                Path(lock.name).unlink(missing_ok=True)


def _locked(lock: IO[str]) -> bool:
    """Whether this process has the lock, and the locked file still has its name: a process that ends removes the file."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), Path(lock.name).stat())
    except OSError:
        return False


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        # disk errors come wrapped in readable ones
        error = error.__cause__
    return False


def forget_old(own: Path) -> None:
    """Removes unfinished streams, and units of shared ones, that were not continued for a week."""
    for folder in own.parent.glob(f"*{_ENDING}"):
        file = folder / "progress.json"
        if folder != own and file.exists() and time.time() - file.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    # a folder changes with each unit that is begun in it
    for folder in own.parent.glob(f"*{UNITS_ENDING}"):
        if folder != own and time.time() - folder.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
