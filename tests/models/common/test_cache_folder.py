"""Where the cache is."""

from pathlib import Path

import pytest

from decoct.models.common.cache_folder import cache_dir
from decoct.models.common.errors import UserError


def test_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("value", [None, ""])
def test_cache_is_in_the_home_folder_otherwise(value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DECOCT_CACHE", value or "")
    if value is None:
        monkeypatch.delenv("DECOCT_CACHE")
    assert cache_dir() == tmp_path / ".cache" / "decoct"


def test_a_file_in_the_way_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="DECOCT_CACHE"):
        cache_dir()
