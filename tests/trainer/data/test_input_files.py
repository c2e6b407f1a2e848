"""Which files a name, a folder or a glob means, and what is in them, packed or not."""

import bz2
import gzip
import json
import lzma
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.data import input_files as files
from decoct.trainer.data.documents import read_documents
from decoct.trainer.data.file_documents import read_file
from decoct.trainer.data.input_files import find_files, opened, shown_path
from decoct.trainer.settings import DataSettings

TEXTS = ["one\ntwo", "d\u00e9j\u00e0, \u6f22\u5b57", 'a "quoted" word']
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def texts(path: Path) -> list[str]:
    return [text for text in read_file(path, "text") if text.strip()]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_packed_files_hold_what_was_packed(tmp_path: Path, packing: str, name: str) -> None:
    plain, packed = tmp_path / name, tmp_path / (name + packing)
    plain.write_text(LINES)
    packed.write_bytes(PACKERS[packing](LINES.encode()))
    assert texts(packed) == texts(plain) != []


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_that_are_cut_short_are_named(tmp_path: Path, packing: str) -> None:
    file = tmp_path / f"a.jsonl{packing}"
    data = PACKERS[packing]("".join(json.dumps({"text": str(n) * (n % 9)}) + "\n" for n in range(3000)).encode())
    for harm in (data[: len(data) // 2], b"not packed at all, this is"):
        file.write_bytes(harm)
        with pytest.raises(UserError, match=rf"a\.jsonl\{packing} is not a whole \{packing} file"):
            texts(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", LINES),
        ("a.json", json.dumps([{"text": text} for text in TEXTS])),
        ("indented.json", json.dumps([{"text": text} for text in TEXTS], indent=2)),
        ("objects.json", LINES),
        ("array.jsonl", json.dumps([{"text": text} for text in TEXTS])),
        ("a.csv", 'id,text\n1,"one\ntwo"\n2,"d\u00e9j\u00e0, \u6f22\u5b57"\n3,"a ""quoted"" word"\n'),
        ("a.tsv", 'text\tid\n"one\ntwo"\t1\n"d\u00e9j\u00e0, \u6f22\u5b57"\t2\n"a ""quoted"" word"\t3\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_kind_and_encoding_gives_the_same_texts(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert texts(tmp_path / name) == TEXTS


def test_text_files_are_read_by_their_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.md").write_bytes(TEXTS[1].encode(encoding))
        assert texts(tmp_path / "a.md") == [TEXTS[1]]
    (tmp_path / "a.md").write_bytes("plain words".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"UTF-16 without a byte-order mark.*iconv"):
        texts(tmp_path / "a.md")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", '[{"text": "x"}, {"text": "y"', r"a\.json, item 2 is not whole JSON"),
        ("a.json", '[{"text": "x"} {"text": "y"}]', r"ends after item 1"),
        ("a.json", '[{"text": "x"}, 3]', r"a\.json, item 2 is not a JSON object, but '3'"),
        ("a.json", "[" * 100_000, r"is not whole JSON"),
        ("a.csv", "text,n\nx,1\ny,2,3\n", r"a\.csv:3 has more columns than the header"),
        ("a.csv", 'text\n"never ends\n', r"a\.csv:\d cannot be read"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=why):
        texts(tmp_path / name)


def test_a_folder_is_all_files_of_its_kind(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "a.jsonl", ".hidden.jsonl", ".git/x.jsonl", "README.md", "LICENSE.txt", "picture.png"):
        file = tmp_path / "corpus" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(LINES.encode()) if name.endswith("gz") else LINES.encode())
    passed: Counter[str] = Counter()
    found = find_files([str(tmp_path / "corpus")], passed)
    assert [file.relative_to(tmp_path / "corpus").as_posix() for file in found] == ["a.jsonl", "b/1.jsonl.gz", "b/2.jsonl"]
    assert sum(passed.values()) == 4
    documents = read_documents(DataSettings(files=(str(tmp_path / "corpus"),)))
    assert list(documents) == TEXTS * 3
    assert documents.passed == passed


def test_a_folder_of_several_kinds_or_of_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file that can be read"):
        find_files([str(tmp_path)])
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text(LINES)
    with pytest.raises(UserError, match=r"several kinds \(1 \.jsonl, 1 \.txt\); name the ones to read: .*\*\*"):
        find_files([str(tmp_path)])


def test_a_dataset_saved_to_disk_is_told_apart(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"save_to_disk.*to_parquet"):
        find_files([str(tmp_path)])


def test_pipes_sockets_and_devices_are_refused_without_opening_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        for place, what in (("pipe.txt", "a pipe"), ("socket.txt", "a socket"), ("/dev/zero", "a device")):
            with pytest.raises(UserError, match=f"is {what}, which cannot be read more than once"):
                find_files([place])
        with pytest.raises(UserError, match="no file that can be read"):
            find_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("https://example.org/a.jsonl", "this is an address"), ("someone/stories", r"hub goes to data\.hub")],
)
def test_what_is_no_path_is_told_where_it_goes(pattern: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        find_files([pattern])


def test_names_that_are_no_utf8_are_read_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("some text")
    documents = read_documents(DataSettings(files=(str(tmp_path),)))
    assert list(documents) == ["some text"]
    assert documents.description == r"caf\xe9.txt"
    (tmp_path / name).write_bytes(b"\xff\x00")
    with pytest.raises(UserError) as caught:
        read_documents(DataSettings(files=(str(tmp_path),)))
    assert r"caf\xe9.txt" in str(caught.value)
    assert str(caught.value).isascii()
    assert shown_path(name) == r"caf\xe9.txt"
    assert shown_path("a\nb\x1b[31m.txt") == r"a\nb\x1b[31m.txt"


def test_a_file_that_unpacks_to_absurdly_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_EXPANDED_BYTES", 100_000)
    monkeypatch.setattr(files, "MOST_EXPANSION", 10)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"word " * 100_000))
    with pytest.raises(UserError, match="unpacks to more than 100,000 bytes"):
        texts(tmp_path / "a.txt.gz")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"word " * 10_000))
    assert len(texts(tmp_path / "b.txt.gz")[0]) == 50_000


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt cannot be read \(No such file"), opened(tmp_path / "gone.txt"):
        pass


def test_blank_documents_and_halves_of_pairs_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x \\ud83d"}\n{"text": " "}\n{"text": null}\n{"text": "\\ud83d\\ude42"}\n')
    documents = read_documents(DataSettings(files=(str(tmp_path / "a.jsonl"),)))
    for _ in range(2):
        assert list(documents) == ["x ?", "\U0001f642"]
        assert sorted(documents.notes.values()) == [1, 2]
