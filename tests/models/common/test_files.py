"""Folders and files are there whole or not at all: exceptions, kills, full disks, read-only places."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from decoct.models.common.errors import UserError
from decoct.models.common.files import (
    append_line,
    atomic_directory,
    check_free_space,
    check_writable_folder,
    clean_leftovers,
    sha256_file,
    sha256_json,
    storage_error,
    write_json_atomic,
    write_text_atomic,
)


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_atomic_directory_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_directory(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.startswith(f".model.{socket.gethostname()}-{os.getpid()}-")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert [p.name for p in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_atomic_directory_leaves_nothing_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "model") as temporary:
            (temporary / "a.txt").write_text("a")
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_never_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with pytest.raises(UserError, match="exists already"), atomic_directory(target):
        pytest.fail("the block must not run")


def test_atomic_directory_never_overwrites_what_appeared_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def write() -> None:
        with atomic_directory(target):
            target.mkdir()  # empty: a bare rename would silently replace it

    with pytest.raises(UserError, match="exists already"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_killed_writer_leaves_only_a_leftover_that_the_next_start_removes(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from decoct.models.common.files import atomic_directory
        with atomic_directory(Path(sys.argv[1]) / "model") as temporary:
            (temporary / "half.bin").write_bytes(b"x" * 1000)
            print("ready", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        assert clean_leftovers(tmp_path) == [], "a living process's work must stay"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    assert not (tmp_path / "model").exists()
    assert len(clean_leftovers(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def test_clean_leftovers_keeps_other_hosts_own_work_and_everything_else(tmp_path: Path) -> None:
    other_host = tmp_path / ".model.elsewhere-999999999-0123abcd.tmp"
    other_host.mkdir()
    (tmp_path / ".hidden.tmp").mkdir()
    reused_id = tmp_path / f".old.{socket.gethostname()}-{os.getpid()}-0123abcd.tmp"
    reused_id.mkdir()
    with atomic_directory(tmp_path / "model") as temporary:
        assert clean_leftovers(tmp_path) == [reused_id], "this process does not know it, so a process of the same id left it"
        assert temporary.exists()
    assert other_host.exists()
    assert (tmp_path / ".hidden.tmp").exists()
    assert clean_leftovers(tmp_path / "nowhere") == []


def test_a_full_disk_is_a_readable_error_and_leaves_the_old_things_whole(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "record.json", "old")
    (tmp_path / "old.jsonl").write_text("{}\n")
    code = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from safetensors.numpy import save_file
        from decoct.models.common.errors import UserError
        from decoct.models.common.files import append_line, atomic_directory, check_writable_folder, write_text_atomic
        folder = Path(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        def plain():
            with atomic_directory(folder / "model") as temporary:
                (temporary / "small.txt").write_text("fits")
                (temporary / "big.bin").write_bytes(b"x" * 100_000)
        def rust():
            with atomic_directory(folder / "model") as temporary:
                save_file({"a": np.zeros(100_000, np.float32)}, temporary / "model.safetensors")
        actions = (plain, rust, lambda: write_text_atomic(folder / "record.json", "n" * 100_000),
                   lambda: append_line(folder / "old.jsonl", "n" * 100_000), lambda: check_writable_folder(folder, "run folder"))
        for action in actions:
            try:
                action()
            except UserError as error:
                print(str(error).replace(chr(10), " "))
    """
    result = _python(code, tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert len(lines) == 5
    assert all("file-size limit was reached" in line for line in lines), lines
    assert "run folder" in lines[4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.jsonl", "record.json"]
    assert (tmp_path / "record.json").read_text() == "old"
    assert (tmp_path / "old.jsonl").read_text().startswith("{}\n")


def test_enospc_is_named_as_a_full_disk() -> None:
    try:
        with Path("/dev/full").open("w") as handle:
            handle.write("x")
    except OSError as error:
        readable = storage_error(error, Path("runs/a"), "write")
        assert readable is not None
        assert "cannot write runs/a: the disk is full" in str(readable)
    assert storage_error(RuntimeError("I/O error: No space left on device (os error 28)"), Path("a"), "write") is not None
    assert storage_error(FileNotFoundError(2, "no such file"), Path("a"), "write") is None


def test_write_text_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"b": float("nan"), "a": [1, float("inf")], "c": "é"})
    assert json.loads(path.read_text()) == {"b": None, "a": [1, None], "c": "é"}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "\ud800")
    assert json.loads(path.read_text())["c"] == "é"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_append_line_closes_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with path.open("a") as handle:
        handle.write('{"step": 2, "lo')
    append_line(path, {"step": 3, "loss": float("nan")})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "lo', '{"step": 3, "loss": null}']


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"b": 1, "a": [1.5, "é"]}) == sha256_json({"a": [1.5, "é"], "b": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        sha256_json({"a": float("nan")})


def test_check_writable_folder_names_the_file_in_the_way(tmp_path: Path) -> None:
    check_writable_folder(tmp_path / "new" / "runs", "run folder")
    assert list((tmp_path / "new" / "runs").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs" / "a"):
        with pytest.raises(UserError, match=r"run folder cannot be written: .*/file is a file where a folder should be"):
            check_writable_folder(folder, "run folder")
    with pytest.raises(UserError, match="is a file where a folder should be"), atomic_directory(tmp_path / "file" / "model"):
        pytest.fail("the block must not run")


def test_check_free_space_gives_both_numbers(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1, "the export")
    with pytest.raises(UserError, match=r"the export needs 1,000,000,000,000,000,000 bytes, but .* has [\d,]+ bytes free"):
        check_free_space(tmp_path / "not" / "yet", 10**18, "the export")


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), real_fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), real_rename(self, target))[1])
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "a.txt").write_text("a")
    assert events == ["a.txt", temporary.name, "rename", tmp_path.name]


def test_importing_files_is_quick() -> None:
    started = time.monotonic()
    result = _python("import decoct.models.common.files, decoct.models.folder.safetensors_read, sys; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr
    assert time.monotonic() - started < 5
