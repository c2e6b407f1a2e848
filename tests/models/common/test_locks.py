"""Locks are held by one process, say by whom, and go when it dies."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from decoct.models.common.errors import UserError
from decoct.models.common.locks import Lock, acquire_or_refuse, is_held, waiting_for

HOLD = """
import os, sys, time
from pathlib import Path
from decoct.models.common.locks import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.acquire()
done, begun = os.pipe()
if sys.argv[2] == "fork":
    if not os.fork():
        os.write(begun, b"x")
        time.sleep(60)
    # the child has given its copy up once it runs on
    os.read(done, 1)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@contextmanager
def held_elsewhere(file: Path, how: str = "plain") -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, str(file), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # it may be over already
                os.killpg(process.pid, 9)


def test_one_has_it_and_the_other_is_told_who(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "lock"
    with held_elsewhere(file) as process:
        lock = Lock(file)
        assert not lock.acquire()
        with pytest.raises(UserError, match=rf"the run folder x is in use by process {process.pid} on .* choose another folder"):
            acquire_or_refuse(lock, "the run folder x", print, seconds=0)
        process.communicate("")
    assert not file.exists(), "it is removed when it is given back"
    assert lock.acquire()
    lock.release()
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_killed_holder_holds_nothing_and_its_children_neither(how: str, tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with held_elsewhere(file, how) as process:
        process.kill()
        process.wait()
        lock = Lock(file)
        assert lock.acquire(), "the forked child lives on, and does not hold the lock"
        assert f'"process": {os.getpid()}' in file.read_text()
        lock.release()


def test_two_locks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    one, two = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert one.acquire()
    assert one.acquire(), "again is no other"
    assert not two.acquire()
    one.release()
    assert two.acquire()
    two.release()


def test_a_lock_whose_file_was_removed_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder gives its lock back, which removes the file, between the other's opening and locking of it."""
    import fcntl

    file, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            file.unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = Lock(file)
    assert lock.acquire()
    assert len(calls) == 2
    assert file.exists()
    lock.release()


def test_who_waits_is_told_once_and_takes_over_from_the_dead(tmp_path: Path) -> None:
    said: list[str] = []
    with held_elsewhere(tmp_path / "lock") as process:

        def say(text: str) -> None:
            said.append(text)
            process.kill()

        with waiting_for(tmp_path / "lock", "makes the same teacher", say):
            assert process.wait() == -9
    assert len(said) == 1
    assert said[0].startswith(f"process {process.pid} on ")
    assert said[0].endswith("makes the same teacher; waiting for it")


def test_a_file_system_without_locks_is_told_and_does_not_stop_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", flock)
    said: list[str] = []
    with waiting_for(tmp_path / "lock", "works", said.append):
        pass
    assert said == [f"the file system of {tmp_path} has no locks (flock): make sure that no second process works there at the same time"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"process": "x"}', b"{}"])
def test_a_holder_that_says_nothing_useful_is_another_process(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(content)
    assert Lock(tmp_path / "lock").holder() == "another process"


def test_refusing_waits_for_one_that_is_just_going(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock") as process:
        assert process.stdin is not None
        process.stdin.close()
        began = time.monotonic()
        lock = Lock(tmp_path / "lock")
        acquire_or_refuse(lock, "x", print, seconds=20)
        assert time.monotonic() - began < 20
        lock.release()


def test_a_holder_on_another_machine_is_given_time_to_be_missed(tmp_path: Path) -> None:
    """A file server keeps the locks of a machine that died for a while, and a job that is started again must not be refused for that."""
    file, said = tmp_path / "lock", list[str]()
    with held_elsewhere(file) as process:
        file.write_text('{"process": 7, "host": "node9", "since": "then"}')

        def say(text: str) -> None:
            said.append(text)
            process.kill()

        lock = Lock(file)
        acquire_or_refuse(lock, "x", say, seconds=0, elsewhere=20)
        lock.release()
    assert said == ["x is in use by process 7 on node9 (since then); waiting 20 seconds, in case that machine has died"]
    with held_elsewhere(file):
        file.write_text('{"process": 7, "host": "node9", "since": "then"}')
        with pytest.raises(UserError, match="process 7 on node9"):
            acquire_or_refuse(Lock(file), "x", print, seconds=0, elsewhere=0.3)


def test_looking_at_a_lock_tells_who_has_it_and_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert not is_held(file)
    assert not file.exists()
    with held_elsewhere(file) as process:
        assert is_held(file)
        process.kill()
        process.wait()
        assert not is_held(file), "the file is left, and nobody holds it"
        assert file.exists()
    lock = Lock(file)
    assert lock.acquire()
    assert is_held(file)
    lock.release()
    assert not is_held(file)
