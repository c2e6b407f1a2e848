"""Where documents come from, and what a user is told when they do not."""

import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decoct.models.common import hash_cache
from decoct.models.common.errors import UserError
from decoct.trainer.data.documents import STDLIB_BYTES, read_documents, stdlib_files
from decoct.trainer.settings import DataSettings


def read(*patterns: object, **more: object) -> list[str]:
    return list(read_documents(DataSettings(files=tuple(str(p) for p in patterns), **more)))  # pyright: ignore[reportArgumentType]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_python_stdlib_is_whole_files_in_order_up_to_eight_megabytes() -> None:
    documents = read_documents(DataSettings(builtin="python-stdlib"))
    files = stdlib_files(Path(sysconfig.get_path("stdlib")))
    texts = list(documents)
    sizes = [len(text.encode()) for text in texts]
    assert STDLIB_BYTES * 0.8 < sum(sizes) <= STDLIB_BYTES
    nonblank = [file for file in files if file.read_bytes().strip()]
    assert [text.encode() for text in texts[:20]] == [file.read_bytes() for file in nonblank[:20]]
    assert texts == list(documents), "a second reading differs"
    assert "python-stdlib" in documents.description
    assert documents.fingerprint == read_documents(DataSettings(builtin="python-stdlib")).fingerprint


def test_stdlib_files_leave_out_tests_packages_and_idlelib(tmp_path: Path) -> None:
    kept = ["b.py", "a/z.py", "a/test.py", "a-b.py"]
    for name in [*kept, "test/x.py", "a/tests/x.py", "site-packages/p/x.py", "idlelib/x.py", "a/x.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    assert [file.relative_to(tmp_path).as_posix() for file in stdlib_files(tmp_path)] == sorted(kept)


def test_text_files_are_read_sorted_once_and_without_blank_ones(tmp_path: Path) -> None:
    for name, text in {"b.txt": "bee", "a.txt": "\ufeffay", "c.txt": " \n"}.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path / "b.txt", tmp_path / "*.txt") == ["bee", "ay"]
    assert read(tmp_path / "*.txt", max_documents=1) == ["ay"]


def test_jsonl_and_parquet_give_the_named_field(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"body": "one", "n": 1}, "", {"body": None}, {"body": "two \ud800"})
    pq.write_table(pa.table({"n": [1, 2, 3], "body": ["three", None, "four"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "a.jsonl", tmp_path / "b.parquet", text_field="body") == ["one", "two ?", "three", "four"]


def test_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    first, second = tmp_path / "one" / "a.txt", tmp_path / "two" / "a.txt"
    for file in (first, second):
        file.parent.mkdir()
        file.write_text("same text")
    prints = [read_documents(DataSettings(files=(str(file),))).fingerprint for file in (first, second)]
    assert prints[0] == prints[1]
    second.write_text("same texT")
    assert read_documents(DataSettings(files=(str(second),))).fingerprint != prints[0]
    assert read_documents(DataSettings(files=(str(first),), max_documents=1)).fingerprint != prints[0]


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "SMALL", 10)
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", -1.0)
    file = tmp_path / "a.txt"
    file.write_text("a text that is long enough")
    settings = DataSettings(files=(str(file),))
    first = read_documents(settings).fingerprint
    real, hashed = hash_cache.hashlib.file_digest, []
    monkeypatch.setattr(hash_cache.hashlib, "file_digest", lambda handle, name: hashed.append(handle.name) or real(handle, name))
    assert read_documents(settings).fingerprint == first
    assert hashed == []
    file.write_text("another text, as long as that")
    assert read_documents(settings).fingerprint != first
    assert hashed == [str(file)]


def test_no_match_names_pattern_and_the_file_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UserError, match=r"data\.files: no file matches .*corpos\.txt.*did you mean .*corpus\.txt"):
        read(tmp_path / "corpos.txt")
    with pytest.raises(UserError, match=r"data\.files: no file matches .*\*\*/\*\.jsonl"):
        read(tmp_path / "**/*.jsonl")


def test_unknown_suffix_lists_those_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match=r"a\.docx has a suffix .*\.txt, .*\.jsonl, .*\.parquet, and packed"):
        read(tmp_path / "a.docx")


def test_text_of_blanks_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\t")
    with pytest.raises(UserError, match=r"data\.files: a\.txt holds no text"):
        read(tmp_path / "a.txt")


def test_missing_field_names_the_fields_that_are_there(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", {"texts": "one", "id": 1})
    with pytest.raises(UserError, match=r"data\.text_field='text' is not in .*a\.jsonl:1; fields there: texts, id; did you mean 'texts'"):
        read(lines)
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"data\.text_field='text' is not in .*b\.parquet; fields there: content"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize("line", ['{"text": "broken', "[1, 2]", '"text"', "[" * 100_000])
def test_broken_json_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(UserError, match=r"a\.jsonl:3 is not a JSON object"):
        read(file)


def test_field_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.text_field='text' holds a number in .*a\.jsonl:1"):
        read(write_lines(tmp_path / "a.jsonl", {"text": 3}))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"data\.text_field='text' holds int64 in .*b\.parquet"):
        read(tmp_path / "b.parquet")


def test_other_encodings_and_torn_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 \(byte 3.*iconv"):
        read(tmp_path / "a.txt")
    pq.write_table(pa.table({"text": ["x" * 1000]}), tmp_path / "b.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:200])
    with pytest.raises(UserError, match=r"b\.parquet is not a whole Parquet file"):
        read(tmp_path / "b.parquet")
