"""The reader takes every file for hostile: whatever was done to it, the answer is a sentence, soon, in little memory."""

import ast
import contextlib
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoct.models.common.errors import UserError
from decoct.qat.readers import gguf_file as reader
from decoct.qat.readers import gguf_model as read_gguf_model
from decoct.qat.readers.gguf_file import read_gguf
from decoct.qat.verify import gguf_metadata as gguf_structure

Entry = tuple[str, int, bytes]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def table(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(entries: list[bytes], tensors: list[bytes], data: bytes, *, counts: tuple[int, int] | None = None, version: int = 3) -> bytes:
    """A file as another tool could write it; ``counts`` = (tensors, entries) that the header claims."""
    count = counts or (len(tensors), len(entries))
    header = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def q4_0(scale: float, codes: list[int]) -> bytes:
    return struct.pack("<e", scale) + bytes((codes[j] + 8) | (codes[j + 16] + 8) << 4 for j in range(16))


CODES = [(7 * j) % 16 - 8 for j in range(32)]
ENTRIES = [
    entry("general.architecture", 8, text("llama")),
    entry("a.float", 6, struct.pack("<f", 0.5)),
    entry("a.list", 9, struct.pack("<IQ", 8, 2) + text("x") + text("ü")),
    entry("a.numbers", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
]
TENSORS = [table("output_norm.weight", (3,), 0, 0), table("output.weight", (32, 2), 2, 32), table("token_embd.weight", (2, 2), 30, 96)]
DATA = (
    struct.pack("<3f", 1, 2, 3)
    + bytes(20)
    + (q4_0(0.5, CODES) + q4_0(-2.0, CODES)).ljust(64, b"\0")
    + struct.pack("<4H", 0x3F80, 0, 0x8000, 0xC000)
)
SOUND = file_of(ENTRIES, TENSORS, DATA)


def read(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def read_all(path: Path) -> None:
    file = read_gguf(path)
    for name in file.tensors:
        file.read(name)


def test_readers_share_no_code_with_the_writer() -> None:
    for module in (reader, read_gguf_model, gguf_structure):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name for name in imported if "export" in name or "pack" in name or "torch" in name} == set()


def test_reads_a_file_made_by_hand(tmp_path: Path) -> None:
    file = read(tmp_path, SOUND)
    assert file.metadata["a.list"] == ["x", "ü"]
    assert file.metadata["a.numbers"].tolist() == [1, -2, 3]
    assert (file.metadata["general.architecture"], file.metadata["a.float"]) == ("llama", 0.5)
    assert file.read("output_norm.weight").tolist() == [1, 2, 3]
    assert file.read("output.weight").tolist() == [[0.5 * code for code in CODES], [-2.0 * code for code in CODES]]
    assert file.read("token_embd.weight").tolist() == [[1, 0], [-0.0, -2]]
    _, codes, scales = file.decode("output.weight")
    assert (codes.tolist(), scales.tolist()) == ([CODES, CODES], [[0.5], [-2.0]])


def test_reads_q8_0_and_q4_1_made_by_hand(tmp_path: Path) -> None:
    eight = struct.pack("<e32b", 0.25, *range(-16, 16))
    one = struct.pack("<ee", 0.5, -3.0) + bytes(j | 15 - j << 4 for j in range(16))
    tensors = [table("a", (32,), 8, 0), table("b", (32,), 3, 64)]
    file = read(tmp_path, file_of([], tensors, eight.ljust(64, b"\0") + one))
    assert file.read("a").tolist() == [0.25 * q for q in range(-16, 16)]
    assert file.read("b").tolist() == [0.5 * u - 3 for u in [*range(16), *range(15, -1, -1)]]


def test_reads_q5_0_q5_1_and_q2_0_made_by_hand(tmp_path: Path) -> None:
    """Weights 0 to 31 in order: the low halves of the bytes are 0 to 15 twice, the fifth bits those of weights 16 to 31."""
    nibbles, fifths = bytes(j | j << 4 for j in range(16)), struct.pack("<I", 0xFFFF0000)
    five = struct.pack("<e", 0.5) + fifths + nibbles
    one = struct.pack("<ee", 0.5, -3.0) + fifths + nibbles
    two = struct.pack("<e", -0.25) + bytes([0b11_10_01_00]) * 16
    tensors = [table("a", (32,), 6, 0), table("b", (32,), 7, 32), table("c", (64,), 42, 64)]
    file = read(tmp_path, file_of([], tensors, five.ljust(32, b"\0") + one.ljust(32, b"\0") + two))
    assert file.read("a").tolist() == [0.5 * (u - 16) for u in range(32)]
    assert file.read("b").tolist() == [0.5 * u - 3 for u in range(32)]
    assert file.read("c").tolist() == [0.25, 0, -0.25, -0.5] * 16
    _, codes, scales = file.decode("c")
    assert (codes.tolist(), scales.tolist()) == ([-1, 0, 1, 2] * 16, [-0.25])


HUGE = 1 << 62
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "foreign": (b"PK\3\4" + bytes(100), "does not begin with 'GGUF'"),
    "version": (file_of(ENTRIES, TENSORS, DATA, version=7), "version 7"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "many tensors": (file_of(ENTRIES, TENSORS, DATA, counts=(HUGE, 4)), "tensors, more than"),
    "many entries": (file_of(ENTRIES, TENSORS, DATA, counts=(3, HUGE)), "metadata entries, more than"),
    "long string": (file_of([struct.pack("<Q", HUGE) + b"x"], [], b""), "bytes of a metadata key, more than"),
    "long array": (file_of([entry("a", 9, struct.pack("<IQ", 4, HUGE))], [], b""), "numbers in 'a', more than"),
    "long list": (file_of([entry("a", 9, struct.pack("<IQ", 8, HUGE))], [], b""), "strings in 'a', more than"),
    "array of arrays": (file_of([entry("a", 9, struct.pack("<IQ", 9, 1))], [], b""), "elements of the unknown type 9"),
    "unknown value": (file_of([entry("a", 99, b"")], [], b""), "unknown type 99"),
    "not text": (file_of([entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], [], b""), "is not UTF-8"),
    "same key": (file_of([ENTRIES[0], ENTRIES[0]], [], b""), "'general.architecture' occurs twice"),
    "same tensor": (file_of(ENTRIES, [TENSORS[0], TENSORS[0]], DATA), "'output_norm.weight' occurs twice"),
    "alignment": (file_of([entry("general.alignment", 4, struct.pack("<I", 33))], [], b""), "general.alignment is 33"),
    "dimensions": (file_of([], [text("a") + struct.pack("<I", 5000)], b""), "5,000 dimensions"),
    "no rows": (file_of([], [table("a", (0, 4), 0, 0)], b""), "impossible shape"),
    "enormous": (file_of([], [table("a", (HUGE, HUGE), 0, 0)], b""), "impossible shape"),
    "outside": (file_of([], [table("a", (4,), 0, 1 << 40)], bytes(16)), "truncated: tensor 'a' ends at"),
    "wide": (file_of([], [table("a", (1 << 40,), 0, 0)], bytes(16)), "truncated: tensor 'a' ends at"),
    "unknown type": (file_of([], [table("a", (32,), 16, 0)], bytes(144)), "ggml type 16; this reader knows F32"),
    "half a block": (file_of([], [table("a", (33,), 2, 0)], bytes(36)), "not a multiple of 32"),
    "overlap": (file_of([], [table("a", (16,), 0, 0), table("b", (8,), 0, 32)], bytes(64)), "'b' overlaps tensor 'a'"),
    "hole": (file_of([], [table("a", (8,), 0, 0), table("b", (8,), 0, 64)], bytes(96)), "'b' leaves a hole behind tensor 'a'"),
    "trailing": (SOUND + bytes(64), "belong to no tensor"),
    "padding": (file_of([], [table("a", (1,), 0, 0)], bytes(5) + b"x" + bytes(26)), "padding after tensor 'a' is not zero"),
    "NaN": (file_of([], [table("a", (1,), 0, 0)], struct.pack("<f", float("nan"))), "NaN or infinite"),
    "infinite scale": (file_of([], [table("a", (32,), 2, 0)], q4_0(float("inf"), CODES)), "scale that is not finite"),
    "zero scale": (file_of([], [table("a", (32,), 2, 0)], q4_0(0.0, CODES)), "scale 0 whose codes are not"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_all(tmp_path / "x.gguf")
    assert "x.gguf" in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for length in range(len(SOUND)):
        with pytest.raises(UserError):
            read(tmp_path, SOUND[:length])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.gguf cannot be read"):
        read_gguf(tmp_path / "nowhere.gguf")


def mutated(chosen: random.Random, content: bytes) -> bytes:
    """Bytes changed, numbers replaced by extreme ones, pieces cut, doubled or moved."""
    data = bytearray(content)
    for _ in range(chosen.randint(1, 4)):
        place = chosen.randrange(max(1, len(data)))
        kind = chosen.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([chosen.randrange(256)])
        elif kind == 1:
            data[place : place + 8] = struct.pack("<Q", chosen.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data), 1 << 40]))
        elif kind == 2:
            data[place : place + 4] = struct.pack("<I", chosen.choice([0, 1, 8, 9, 2**31 - 1, 2**32 - 1]))
        elif kind == 3:
            del data[place : place + chosen.randint(1, 40)]
        elif kind == 4:
            data[place:place] = data[place : place + chosen.randint(1, 40)]
        else:
            data[place:place] = bytes(chosen.randint(1, 16))
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_mutated_headers_give_a_sentence_or_a_sound_file(tmp_path: Path, seed: int) -> None:
    """No other exception, no hang, no memory to speak of: 4 x 2,500 files, their data read too where the header passes."""
    chosen, path, header = random.Random(seed), tmp_path / "x.gguf", len(SOUND) - len(DATA)
    started, passed = time.monotonic(), 0
    tracemalloc.start()
    for _ in range(2500):
        path.write_bytes(mutated(chosen, SOUND[:header]) + DATA)
        with contextlib.suppress(UserError):
            read_all(path)
            passed += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
    assert time.monotonic() - started < 120
    assert passed < 1000


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_any_bytes_behind_the_magic_are_survived(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + content)
    with contextlib.suppress(UserError):
        read_all(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: [*tensors, table("blk.0.conv.weight", (1,), 0, 0)], "'blk.0.conv.weight' belongs to no llama model"),
        (lambda tensors: [*tensors, table("blk.99999999999.attn_q.weight", (1,), 0, 0)], "belongs to no llama model"),
    ],
)
def test_tensors_of_other_models_are_refused(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of(ENTRIES, change([]), struct.pack("<f", 1)))
    with pytest.raises(UserError, match=message):
        read_gguf_model.GgufModel(path)


def test_rows_that_heads_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of(ENTRIES, [table("blk.0.attn_q.weight", (1, 6), 0, 0)], bytes(24)))
    with pytest.raises(UserError, match="6 rows, which None attention heads do not divide"):
        read_gguf_model.GgufModel(path).tensor("model.layers.0.self_attn.q_proj.weight")


def test_which_file_of_a_folder_is_meant(tmp_path: Path) -> None:
    assert read_gguf_model.find_gguf(tmp_path) is None
    (tmp_path / "a.gguf").write_bytes(SOUND)
    assert read_gguf_model.find_gguf(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(SOUND)
    with pytest.raises(UserError, match="2 GGUF files"):
        read_gguf_model.find_gguf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert read_gguf_model.find_gguf(tmp_path) is None
    assert np.float32(1) == read_gguf(tmp_path / "b.gguf").read("output_norm.weight")[0]
