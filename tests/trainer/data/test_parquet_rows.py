"""Parquet files: in bounded memory, checked before they are believed, and without the nulls that a schema makes."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.data import input_files as files
from decoct.trainer.data.file_documents import read_file
from decoct.trainer.data.file_rows import read_rows


def broken_text(data: bytes) -> pa.Array:
    """A text column of one row with any bytes."""
    offsets = (0).to_bytes(4, "little") + len(data).to_bytes(4, "little")
    return pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def test_bytes_that_are_no_utf8_are_a_message(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": broken_text(b"\xff\xfea")}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet is not a whole Parquet file \(.*UTF"):
        list(read_file(tmp_path / "a.parquet", "text"))


@pytest.mark.parametrize("nested", [False, True])
def test_rows_that_repeat_one_long_text_take_the_memory_of_one(tmp_path: Path, nested: bool) -> None:
    value = "word " * 100_000
    column = [[{"role": "user", "content": value}]] * 1000 if nested else [value] * 1000
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", dictionary_pagesize_limit=2**30, compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    most = 0
    for count, (_, row) in enumerate(read_rows(tmp_path / "a.parquet"), 1):
        assert not isinstance(row, UserError)
        most = max(most, pa.total_allocated_bytes() - before)
        if count == 300:
            break
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most + python < 20 * len(value), "1,000 rows would be 500 MB"


def test_a_file_that_holds_absurdly_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_EXPANDED_BYTES", 1_000_000)
    pq.write_table(pa.table({"text": ["word " * 20_000] * 1000}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="unpacks to more than"):
        list(read_file(tmp_path / "a.parquet", "text"))


def test_keys_that_a_schema_makes_for_rows_without_them_are_taken_out(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "call": {"arguments": {"city": "Oslo"}}}]},
        {"messages": [{"role": "user", "content": "q", "call": {"arguments": {"hour": 7}}}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [row for _, row in read_rows(tmp_path / "a.parquet", ["messages"])]
    assert read == [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "call": {"arguments": {"city": "Oslo"}}}]},
        {"messages": [{"role": "user", "content": "q", "call": {"arguments": {"hour": 7}}}]},
    ]


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "other": [1]}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet", ["text"], name="a")) == [("a, row 1", {"text": "x"})]
