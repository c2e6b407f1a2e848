"""Memory that is left, of a machine and of a container with a limit."""

from pathlib import Path

import pytest

from decoct.models.common.host_memory import available_bytes


def test_what_the_system_has_to_give(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:      1000 kB\n")
    assert available_bytes(tmp_path, tmp_path) == 1_024_000


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_and_its_file_pages_are_free(tmp_path: Path, version: int) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\n")
    (tmp_path / "memory").mkdir()
    names = ("memory.max", "memory.current") if version == 2 else ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    limit, used = (tmp_path / name for name in names)
    limit.write_text("900000\n")
    used.write_text("800000\n")
    limit.with_name("memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert available_bytes(tmp_path, tmp_path) == 150_000
    used.write_text("990000\n")
    assert available_bytes(tmp_path, tmp_path) == 0
    limit.write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert available_bytes(tmp_path, tmp_path) == 1_024_000


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None
