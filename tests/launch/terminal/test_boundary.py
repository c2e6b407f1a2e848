"""One boundary: every expected kind of error ends in one message and a code; the others say that they are bugs."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.launch.cli import app as cli
from decoct.launch.terminal.boundary import bug_report, ending_of
from decoct.models.common.errors import GateFailed, MemoryFullError, NonFiniteError, UserError
from decoct.parts import MARK, PartError

KINDS: dict[str, tuple[BaseException, int, str]] = {
    "a mistake": (UserError("no such key"), 2, "no such key"),
    "NaN": (NonFiniteError("loss"), 1, "loss"),
    "a gate": (GateFailed("worse"), 3, "worse"),
    "memory": (MemoryError(), 1, "this machine is out of memory. Lower trainer.micro_batch"),
    "a GPU's memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        1,
        "the GPU is out of memory (it requested 2.00 GiB",
    ),
    "torch's CPU memory": (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 1, "this machine"),
    "a full disk without a name": (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full; free some space"),
    "a full disk told by a library": (RuntimeError("Error while serializing: I/O error: No space (os error 28)"), 2, "the disk is full"),
    "a disk that fails": (OSError(errno.EIO, "Input/output error"), 1, "the disk failed to read or write"),
    "a disk that fails at a file": (OSError(errno.EIO, "Input/output error", "/x/y"), 1, "/x/y: the disk failed"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: permission was denied"),
    "a name too long": (OSError(errno.ENAMETOOLONG, "File name too long", "/x/" + "y" * 300), 2, "the name is too long"),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), 2, "/x: Is a directory; give another path"),
    "a name of bytes": (OSError(errno.ENOENT, "No such file", b"/x/\xff"), 2, "/x/"),
    "a number for a name": (OSError(errno.EBADF, "Bad file descriptor", 7), 2, "7: Bad file descriptor"),
    "a network": (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "a connection or device failed"),
    "a name that is not UTF-8": (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), 2, "not UTF-8"),
    "too many threads": (RuntimeError("can't start new thread"), 1, "ulimit -u"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_expected_error_is_one_message(kind: str) -> None:
    error, code, told = KINDS[kind]
    ending = ending_of(error)
    assert ending is not None
    assert ending.code == code
    assert told in ending.message
    assert len(ending.message.splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes"), UnicodeEncodeError("ascii", "é", 0, 1, "x"), AssertionError()])
def test_the_others_are_bugs(error: Exception) -> None:
    assert ending_of(error) is None
    assert bug_report(error).splitlines()[-1].startswith("decoct: this is a bug in decoct ")


def in_users_code(body: str) -> BaseException:
    """The error of a function that an imported file defines."""
    scope: dict[str, Any] = {MARK: "my_parts.py"}
    exec(compile(f"def part():\n    {body}\n", "my_parts.py", "exec"), scope)
    try:
        scope["part"]()
    except BaseException as error:
        return error
    raise AssertionError


def test_an_error_in_imported_code_is_the_users_with_file_and_line() -> None:
    for body, told in (
        ("{}['x']", "KeyError: 'x'"),
        ("open('none')", "FileNotFoundError"),
        ("import json; json.loads('{')", "JSONDecodeError"),
    ):
        ending = ending_of(in_users_code(body))
        assert ending is not None
        assert ending.code == 2
        assert ending.message.startswith(f"my_parts.py:2: {told}")
        assert ending.message.endswith("; this is code that the recipe imports (--debug shows the traceback)")
    assert ending_of(PartError("my_parts.py:3: must return x")).message == "my_parts.py:3: must return x"  # pyright: ignore[reportOptionalMemberAccess]


def test_memory_and_mistakes_that_imported_code_meets_keep_their_message() -> None:
    full = ending_of(in_users_code("raise MemoryError"))
    assert full is not None
    assert (full.code, full.message.startswith("this machine is out of memory")) == (1, True)
    user = ending_of(in_users_code("from decoct import UserError; raise UserError('no such key')"))
    assert user is not None
    assert user.message == "no such key"


def test_a_lost_peer_is_told_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert ending_of(lost) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    ending = ending_of(lost)
    assert ending is not None
    assert (ending.code, ending.by_all) == (1, True)


def ended(error: BaseException, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", *arguments])
    return caught.value.code


def test_the_command_line_ends_with_one_line_and_the_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, _ in KINDS.values():
        assert ended(error, monkeypatch) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("decoct: error: ")


def test_a_bug_keeps_its_traceback_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(KeyError("\x1b[2J"), monkeypatch) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert "resume from the last checkpoint" in told.splitlines()[-1]
    assert "\x1b" not in told


def test_debug_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        cli.main(["run", "--debug"])


def test_control_characters_and_passwords_stay_off_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(UserError("\x1b[2J \udcff http://me:canary@host"), monkeypatch)
    assert capsys.readouterr().err == "decoct: error: \\x1b[2J \\xff http://***@host\n"


def test_other_ranks_tell_their_own_troubles_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in {"RANK": "3", "TORCHELASTIC_RUN_ID": "job"}.items():
        monkeypatch.setenv(name, value)
    from decoct.launch.run.processes import remember_outcome

    remember_outcome(2)  # as rank 0 does
    assert ended(UserError("a mistake that all see"), monkeypatch) == 2
    assert capsys.readouterr().err == ""
    for error in (MemoryError(), MemoryFullError("full"), OSError(errno.EIO, "Input/output error")):
        assert ended(error, monkeypatch) == 1
        assert capsys.readouterr().err.startswith("decoct: rank 3: error: ")
    for file in tmp_path.glob("*.outcome"):
        file.unlink()
    assert ended(UserError("a mistake that it alone sees"), monkeypatch) == 2
    assert capsys.readouterr().err == "decoct: rank 3: error: a mistake that it alone sees\n"


def test_bytes_that_are_not_utf_8_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(AssertionError("never reached"), monkeypatch, "--out", os.fsdecode(b"bad\xff")) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    monkeypatch.setenv("DECOCT_CACHE", os.fsdecode(b"/x\xff"))
    assert ended(AssertionError("never reached"), monkeypatch) == 2


def test_a_terminal_without_the_letters_gets_escapes() -> None:
    command = [sys.executable, "-m", "decoct.launch.cli", "run", "ünï.yaml"]
    for told, more in (
        (b"\\xfcn\\xef.yaml", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}),
        (b"PYTHONUTF8=1", {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}),
    ):
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, check=False)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
        assert told in done.stderr
