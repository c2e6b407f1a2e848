"""The GGUF container: what the package ``gguf`` writes is read, and nothing else."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from decoct.models.common.errors import UserError
from decoct.models.gguf.block_types import BLOCK_TYPES
from decoct.models.gguf.container import read_gguf

from ...support.gguf_files import write_gguf

KEYS = {"block_count": 2, "eps": 1e-6, "text": "é", "flag": True, "numbers": [1, 2, 3], "texts": ["a", "", "日本"], "floats": [0.5, -1.0]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"one": np.arange(12, dtype=np.float32).reshape(3, 4), "two": np.arange(5, dtype=np.float32)}
    return write_gguf(tmp_path / "model.gguf", "llama", KEYS, tensors)


def test_everything_comes_back(file: Path) -> None:
    opened = read_gguf(file)
    assert opened.metadata["general.architecture"] == "llama"
    for key, value in KEYS.items():
        found = opened.metadata[f"llama.{key}"]
        assert found == (pytest.approx(value) if isinstance(value, float) else value)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert list(opened.tensors) == list(theirs)
    one = opened.tensors["one"]
    assert (one.shape, one.type.name, one.begin) == ((3, 4), "F32", theirs["one"].data_offset)
    rows = opened.row_blocks(one, 1, 3).reshape(-1).view("<f4")
    assert rows.tolist() == [4.0, 5, 6, 7, 8, 9, 10, 11]
    assert opened.types() == {"F32": 2}


def test_the_hash_is_of_the_header_alone(file: Path) -> None:
    before = read_gguf(file).header_sha256
    content = bytearray(file.read_bytes())
    content[read_gguf(file).tensors["two"].begin] ^= 255
    file.write_bytes(content)
    assert read_gguf(file).header_sha256 == before
    content[content.index(b"general.architecture") - 1 + len("general.architecture") + 1 + 12] ^= 1
    file.write_bytes(content)
    assert read_gguf(file).header_sha256 != before


def test_block_types_are_those_of_ggml() -> None:
    for number, kind in BLOCK_TYPES.items():
        # Q2_0 is newer than the package
        if kind.name != "Q2_0":
            theirs = gguf.GGMLQuantizationType(number)
            assert (theirs.name, gguf.GGML_QUANT_SIZES[theirs]) == (kind.name, (kind.elements, kind.nbytes))


def header(tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut off: 0 bytes are fewer than the smallest header"),
    "magic": (header(magic=b"GGJT"), "begins with b'GGJT', not with b'GGUF'"),
    "version 1": (header(version=1), "version 1 of the format; versions 2 and 3 are read"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"big-endian \(version 3\)"),
    "many tensors": (header(tensors=2**63), r"declares 9,223,372,036,854,775,808 tensors"),
    "many keys": (header(keys=5), "declares 5 metadata entries"),
    "long key": (header(keys=1) + struct.pack("<Q", 2**40) + b"x" * 40, r"declares 1,099,511,627,776 bytes of a metadata key"),
    "not utf-8": (header(keys=1) + text(b"\xff\xfe") + struct.pack("<IB", 0, 1), "a metadata key is not UTF-8"),
    "unknown type": (header(keys=1) + text(b"k") + struct.pack("<II", 99, 1), "the value of 'k' has the unknown type 99"),
    "nested array": (
        header(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(16),
        "elements of type 9, which is unknown or nested",
    ),
    "long array": (header(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 2**40), "declares 1,099,511,627,776 numbers of 'k'"),
    "twice": (header(keys=2) + 2 * (text(b"k") + struct.pack("<IB", 0, 1)), "the metadata key 'k' occurs twice"),
    "alignment": (header(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 48), "general.alignment is 48, not a power of two"),
    "dimensions": (header(tensors=1) + text(b"t") + struct.pack("<I", 5) + bytes(60), "5 dimensions; 1 to 4 are possible"),
    "no rows": (header(tensors=1) + entry(b"t", (4, 0)), r"impossible shape \(0, 4\)"),
    "overflow": (header(tensors=1) + entry(b"t", (2**40, 2**40, 2**40)), "impossible shape"),
    "kind": (header(tensors=1) + entry(b"t", (4,), 4), "the ggml type 4, which is unknown here"),
    "block": (header(tensors=1) + entry(b"t", (33,), 2), "rows of 33, no multiple of a Q4_0 block of 32"),
    "outside": (header(tensors=1) + entry(b"t", (64,)) + bytes(64), "cut off: tensor 't' ends at byte"),
    "far outside": (header(tensors=1) + entry(b"t", (4,), 0, 2**63), "cut off: tensor 't' ends at byte"),
    "overlap": (header(tensors=2) + entry(b"t", (8,)) + entry(b"u", (8,), 0, 4) + bytes(128), "tensor 'u' lies over 't'"),
    "same name": (header(tensors=2) + entry(b"t", (8,)) + entry(b"t", (8,), 0, 32) + bytes(128), "the tensor 't' occurs twice"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_files_are_refused_in_one_message(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_gguf(file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_cut_off_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    last = read_gguf(file).tensors["two"]
    for length in range(last.begin + last.nbytes):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(UserError):
            read_gguf(tmp_path / "cut.gguf")


def test_no_flipped_byte_of_the_header_breaks_out(file: Path, tmp_path: Path) -> None:
    """Every damage is either read as other values or is a UserError: no other exception, no endless loop."""
    content = file.read_bytes()
    changes: list[Callable[[int], int]] = [lambda byte: byte ^ 255, lambda byte: byte ^ 1, lambda _: 0]
    for at in range(read_gguf(file).tensors["one"].begin):
        for change in changes:
            damaged = bytearray(content)
            damaged[at] = change(damaged[at])
            (tmp_path / "damaged.gguf").write_bytes(damaged)
            try:
                read_gguf(tmp_path / "damaged.gguf")
            except UserError:
                continue


def test_an_unchanged_file_is_parsed_once_and_a_changed_one_again(file: Path) -> None:
    os.utime(file, ns=(10**9, 10**9))
    assert read_gguf(file) is not read_gguf(file), "its attributes have just changed"
    # as after the time in which a second change might not show
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decoct.models.gguf.container.SETTLED_SECONDS", -1.0)
        once = read_gguf(file)
        assert read_gguf(file) is once
        file.write_bytes(file.read_bytes() + bytes(32))
        assert read_gguf(file).size == once.size + 32


def test_a_file_that_shrinks_while_it_is_read_is_refused(file: Path) -> None:
    opened = read_gguf(file)
    file.write_bytes(file.read_bytes()[: opened.tensors["two"].begin])
    with pytest.raises(UserError, match="two was cut off while the file was read"):
        opened.row_blocks(opened.tensors["two"], 0, 1)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_gguf(file)
