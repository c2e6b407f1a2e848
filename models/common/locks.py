"""Locks for one process at a time. The kernel releases them when their holder dies in any way.

A lock is a file under ``flock``; its content names the holder, only for messages. The file is removed on release, so a process that gets
the lock checks that the locked file still has its name. Forked children (data loader workers) close their copy; otherwise an orphan would
keep the lock of its dead parent.
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
# file systems report a taken lock, and the absence of locks, in different ways
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_all: "weakref.WeakSet[Lock]" = weakref.WeakSet()


class Lock:
    """The lock of a file, which is created with its folder if it is missing."""

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        self.lockable = True
        """Whether the file system has locks. Without them ``acquire`` succeeds, and the caller should warn (``no_locks``)."""
        self._handle: int | None = None
        _all.add(self)

    def acquire(self) -> bool:
        """Takes the lock if it is free; returns whether this process has it now.

        Raises:
            UserError: there is a disk error.
        """
        while self._handle is None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                # not truncated here: until the lock is held, the content is another process's
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
                # on a full disk the lock still holds, without the name of its holder
                with suppress(OSError):
                    os.truncate(handle, 0)
                    os.pwrite(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": _now()}).encode(), 0)
            else:
                # its last holder has removed the file after it was opened here: try again with a new one
                os.close(handle)
        return True

    def _is_file(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self.file.stat())
        except OSError:
            return False

    def _content(self) -> dict[str, Any]:
        """The holder as the file names it; {} if it does not."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8", errors="replace"))
            return {"process": int(found["process"]), "host": str(found["host"])[:80], "since": str(found["since"])[:40]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def holder(self) -> str:
        """The holder of the lock, in words."""
        found = self._content()
        return f"process {found['process']} on {found['host']} (since {found['since']})" if found else "another process"

    def is_elsewhere(self) -> bool:
        """Whether the holder is on another machine, according to the file."""
        return self._content().get("host", socket.gethostname()) != socket.gethostname()

    def release(self) -> None:
        """Releases the lock if it is held."""
        if self._handle is not None:
            # removed while the lock is held: afterwards the file could be another process's
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
        # the child inherits the list; its locks are the parent's
        lock._forget()


# flock belongs to the open file, which a fork shares: closing the child's copy leaves the parent's lock
os.register_at_fork(after_in_child=_in_child)


def acquire_or_refuse(lock: Lock, what: str, say: Callable[[str], None], *, seconds: float = 2.0, elsewhere: float = 120.0) -> None:
    """Takes ``lock``, or raises an error that names its holder.

    Args:
        lock: The lock to take.
        what: The locked thing, as in "the run folder runs/x".
        say: Called with a line when it waits for another machine.
        seconds: Time to wait for a holder on this machine: one that was just killed may still be ending.
        elsewhere: Time to wait for a holder on another machine: a file server releases the locks of a dead machine after a while (NFS: 90
            seconds).

    Raises:
        UserError: another process holds it.
    """
    began, reported = time.monotonic(), False
    while not lock.acquire():
        away = lock.is_elsewhere()
        if time.monotonic() - began > (elsewhere if away else seconds):
            raise UserError(f"{what} is in use by {lock.holder()}; wait until it has ended, stop it, or choose another folder")
        if away and not reported:
            say(f"{what} is in use by {lock.holder()}; waiting {elsewhere:.0f} seconds, in case that machine has died")
            reported = True
        time.sleep(POLL_SECONDS)


@contextmanager
def waiting_for(file: Path, doing: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of ``file`` inside the block. Waits for another process that holds it, and takes over if that one dies.

    Args:
        file: File of the lock.
        doing: What its holder does, as in "makes the same teacher".
        say: Called once with a line if it has to wait, and if the file system has no locks.
    """
    lock, reported = Lock(file), False
    while not lock.acquire():
        if not reported:
            say(f"{lock.holder()} {doing}; waiting for it")
            reported = True
        time.sleep(POLL_SECONDS)
    # without locks two processes may do the same work twice, which the user should know
    if not lock.lockable:
        say(no_locks(file))
    # acquired above; the block only releases it
    with lock:
        yield


def no_locks(file: Path) -> str:
    """The warning about a file system without locks."""
    return f"the file system of {file.parent} has no locks (flock): make sure that no second process works there at the same time"


def is_held(file: Path) -> bool:
    """Whether a process holds the lock of ``file``. Nothing is created or changed; without locks in the file system nobody holds one."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # shared: two that look at once do not take each other for a holder
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD
    finally:
        os.close(handle)
    return False
