"""One process at a time: locks that the kernel takes back when their holder dies, however it dies.

A lock is a file under ``flock``; its content says who holds it, for people alone. It is removed when the lock is given back, and whoever
gets the lock looks whether the file is still the one that others see. Forked children (data loader workers) give up their copy, or an
orphan would hold on to what its dead parent had.
"""

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from .errors import UserError
from .files import storage_error

POLL_SECONDS = 0.2
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_all: "weakref.WeakSet[Lock]" = weakref.WeakSet()


class Lock:
    """The lock of a file, which is made with its folder if it is missing."""

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        self.lockable = True
        """Whether the file system has locks; without them ``acquire`` succeeds, and the caller should say so."""
        self._handle: int | None = None
        _all.add(self)

    def acquire(self) -> bool:
        """Take the lock if nobody holds it; whether this process has it now.

        Raises: UserError when the disk refuses.
        """
        while self._handle is None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise (storage_error(error, self.file, "lock") or error) from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    self.lockable = False
                else:
                    os.close(handle)
                    if error.errno in _HELD:
                        return False
                    raise (storage_error(error, self.file, "lock") or error) from error
            if self._is_file(handle):
                self._handle = handle
                with suppress(OSError):
                    os.truncate(handle, 0)
                    os.pwrite(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": _now()}).encode(), 0)
            else:
                os.close(handle)  # its last holder has removed it meanwhile
        return True

    def _is_file(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self.file.stat())
        except OSError:
            return False

    def _told(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8", errors="replace"))
            return {"process": int(found["process"]), "host": str(found["host"])[:80], "since": str(found["since"])[:40]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def holder(self) -> str:
        """Who holds the lock, in words."""
        told = self._told()
        return f"process {told['process']} on {told['host']} (since {told['since']})" if told else "another process"

    def is_elsewhere(self) -> bool:
        """Whether the holder is on another machine, as far as it says."""
        return self._told().get("host", socket.gethostname()) != socket.gethostname()

    def release(self) -> None:
        """Give the lock back; nothing to do when it is not held."""
        if self._handle is not None:
            self.file.unlink(missing_ok=True)
            self._forget()

    def _forget(self) -> None:
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _in_child() -> None:
    for lock in list(_all):
        lock._forget()


os.register_at_fork(after_in_child=_in_child)


def acquire_or_refuse(lock: Lock, what: str, say: Callable[[str], None], *, seconds: float = 2.0, elsewhere: float = 120.0) -> None:
    """Take ``lock``, or say who has ``what``.

    Args:
        lock: To take.
        what: The thing, as in "the run folder runs/x".
        say: Told when it waits for another machine.
        seconds: Wait for a holder on this machine: one that was killed just now may still be going.
        elsewhere: Wait for a holder on another: a file server takes the locks of a dead machine back after a while (NFS: 90 seconds).

    Raises: UserError when another process holds it.
    """
    began, told = time.monotonic(), False
    while not lock.acquire():
        away = lock.is_elsewhere()
        if time.monotonic() - began > (elsewhere if away else seconds):
            raise UserError(f"{what} is in use by {lock.holder()}; wait until it has ended, stop it, or choose another folder")
        if away and not told:
            say(f"{what} is in use by {lock.holder()}; waiting {elsewhere:.0f} seconds, in case that machine has died")
            told = True
        time.sleep(POLL_SECONDS)


@contextmanager
def waiting_for(file: Path, doing: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of ``file``; waits for another process that holds it, and takes over when that one dies.

    Args:
        file: Of the lock.
        doing: What its holder does, as in "makes the same teacher".
        say: Told once when it has to wait, and when the file system has no locks.
    """
    lock, told = Lock(file), False
    while not lock.acquire():
        if not told:
            say(f"{lock.holder()} {doing}; waiting for it")
            told = True
        time.sleep(POLL_SECONDS)
    if not lock.lockable:
        say(no_locks(file))
    with lock:
        yield


def no_locks(file: Path) -> str:
    """What to say where a file system has no locks."""
    return f"the file system of {file.parent} has no locks (flock): see to it that no second process works there at the same time"
