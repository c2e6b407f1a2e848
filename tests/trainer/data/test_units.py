"""Units hold the documents of the files in their order, however they are cut."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.data import units
from decoct.trainer.data.file_documents import read_file
from decoct.trainer.data.pieces import Piece, plain_units, units_from
from decoct.trainer.data.units import texts_of, units_of

TEXTS = ["one", "", "zwei ☃ drei", "x" * 50, "a\nb", "four 😀", "y"]


def lines(texts: list[str], end: str = "\n") -> bytes:
    # characters as they are, so that a cut falls inside some; a blank line, which is no document
    return "\n".join([json.dumps({"text": text}, ensure_ascii=False) for text in texts] + [""]).encode() + end.encode()


def read(files: list[Path], unit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    cut = units_of(files, parts=True)
    return [text for unit in cut for text in texts_of(unit, "text", Counter())], len(cut)


@pytest.mark.parametrize("end", ["\n", ""])
def test_the_documents_of_all_units_are_those_of_the_files(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS, end))
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "c.jsonl").write_bytes(lines(TEXTS[::-1]))
    files = [tmp_path / name for name in ("a.jsonl", "b.txt", "c.jsonl")]
    expected = [text for file in files for text in read_file(file, "text")]
    counts = set()
    # each number of bytes cuts in other places: at line ends, behind them, inside characters
    for unit_bytes in range(1, 400):
        texts, count = read(files, unit_bytes, monkeypatch)
        assert texts == expected, unit_bytes
        counts.add(count)
    assert {1, 2, 5} <= counts
    assert max(counts) > 100


def test_small_files_share_a_unit_and_huge_texts_have_larger_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("abcde")
    files = sorted(tmp_path.iterdir())
    monkeypatch.setattr(units, "UNIT_BYTES", 10)
    assert [len(unit) for unit in units_of(files, parts=True)] == [2] * 5
    monkeypatch.setattr(units, "MOST_UNITS", 2)
    assert [len(unit) for unit in units_of(files, parts=True)] == [5, 5]


def test_what_has_no_lines_of_its_own_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 10)
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "array.jsonl").write_text(json.dumps(rows))
    (tmp_path / "wide.jsonl").write_bytes(lines(TEXTS).decode().encode("utf-16"))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    (tmp_path / "plain.txt").write_text("a long text, which is one document")
    for file in sorted(tmp_path.iterdir()):
        cut = units_of([file], parts=True)
        assert [[getattr(piece, "whole", None) for piece in unit] for unit in cut] == [[True]], file.name
        assert [text for text in texts_of(cut[0], "text", Counter()) if text] == [text for text in read_file(file, "text") if text]
    (tmp_path / "talks.jsonl").write_bytes(lines(TEXTS))
    assert len(units_of([tmp_path / "talks.jsonl"], parts=False)) == 1


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_table_is_cut_between_its_row_groups(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None, *TEXTS], "other": list(range(15))}), file, row_group_size=rows)
    expected = list(read_file(file, "text"))
    assert len(expected) == 15
    for count in range(1, 40):
        texts, number = read([file], -(-file.stat().st_size // count), monkeypatch)
        assert texts == expected, count
        assert number == count or count > 20
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    with pytest.raises(UserError, match=r"data.text_field='body' is not in .*a.parquet; fields there: text, other"):
        list(texts_of(units_of([file], parts=True)[1], "body", Counter()))


@pytest.mark.parametrize("bad", ["{not json", '{"other": 1}', '{"text": 3}', "[1]", "\udcff"])
def test_a_bad_line_is_named_by_its_number_in_the_file(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(TEXTS) + bad.encode(errors="surrogateescape") + b"\n" + lines(TEXTS))
    with pytest.raises(UserError, match=rf"a\.jsonl:{len(TEXTS) + 2}") as whole:
        list(read_file(file, "text"))
    with pytest.raises(UserError) as part:
        read([file], 20, monkeypatch)
    assert str(part.value) == str(whole.value)


def test_units_survive_json_with_any_name(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"odd \xff.txt")
    file.write_text("text")
    cut = units_of([file], parts=True)
    again = units_from(json.loads(json.dumps(plain_units(cut))))
    assert again == cut
    assert again[0][0].is_here()
    file.write_text("longer text")
    assert not again[0][0].is_here()
    assert not Piece(str(tmp_path / "none"), 0, 1, 1).is_here()
