"""A hash that was taken once is not taken again while the file is the same one, and never believed when it is not."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from decoct.models.common import hash_cache
from decoct.models.common.cache_folder import cache_folder
from decoct.models.common.hash_cache import SMALL, cached_sha256

OLD = time.time() - 100


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A large file that was written a while ago. (ctime cannot be set back, so that what counts as long ago is set down.)"""
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", 0.0)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(SMALL + 1))
    os.utime(path, (OLD, OLD))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time a file is hashed."""
    counted: list[int] = []
    real = hashlib.file_digest

    def digest(*arguments: object) -> object:
        counted.append(1)
        return real(*arguments)  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(hash_cache.hashlib, "file_digest", digest)
    return counted


def truth(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_second_look_reads_nothing(file: Path, reads: list[int]) -> None:
    assert cached_sha256(file) == cached_sha256(file) == truth(file)
    assert len(reads) == 1


def test_any_write_is_seen_even_with_the_old_time_and_size(file: Path, reads: list[int]) -> None:
    cached_sha256(file)
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    with file.open("r+b") as handle:
        handle.write(data)
    os.utime(file, (OLD, OLD))  # as tools do that keep times; ctime tells
    assert cached_sha256(file) == truth(file)
    assert len(reads) == 2


def test_another_file_under_the_same_name_is_another(file: Path, tmp_path: Path) -> None:
    cached_sha256(file)
    other = tmp_path / "other"
    other.write_bytes(os.urandom(SMALL + 1))
    os.utime(other, (OLD, OLD))
    other.replace(file)
    assert cached_sha256(file) == truth(file)


def test_what_was_just_written_is_not_remembered(file: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", 2.0)
    cached_sha256(file)
    cached_sha256(file)
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["", "x", "0 0 0 0 0 ", "\0" * 200, "flip"])
def test_a_damaged_cache_is_as_good_as_none(file: Path, damage: str) -> None:
    cached_sha256(file)
    (entry,) = (cache_folder() / "hashes").iterdir()
    whole = entry.read_bytes()
    for at in range(0, len(whole), 3) if damage == "flip" else (0,):
        changed = bytearray(whole)
        changed[at] ^= 1
        entry.write_bytes(changed if damage == "flip" else damage.encode())
        assert cached_sha256(file) == truth(file)


def test_a_cache_that_cannot_be_written_is_done_without(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in-the-way").write_text("")
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "in-the-way"))
    assert cached_sha256(file) == truth(file)


def test_many_at_once_agree_and_leave_one_entry(file: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(cached_sha256(file))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {truth(file)}
    assert len(list((cache_folder() / "hashes").iterdir())) == 1
