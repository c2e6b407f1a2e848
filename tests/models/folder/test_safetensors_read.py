"""Whatever is not exactly a safetensors file is refused, with the file's name and the fault."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from decoct.models.common.errors import UserError
from decoct.models.folder.safetensors_read import TensorInfo, read_header


def _write(path: Path, header: dict[str, Any] | str | bytes, data: bytes = b"", length: int | None = None) -> Path:
    raw = json.dumps(header).encode() if isinstance(header, dict) else header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def _entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_file_of_the_library_reads_back(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "bias": torch.arange(3, dtype=torch.float32),
        "codes": torch.tensor([1, 2], dtype=torch.int8),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == set(tensors)
    assert header.tensors["model.layers.0.weight"].dtype == "BF16"
    assert header.tensors["empty"].shape == (0, 4)
    info = header.tensors["bias"]
    data = (tmp_path / "a.safetensors").read_bytes()[header.data_start :]
    assert np.frombuffer(data[info.begin : info.end], np.float32).tolist() == [0, 1, 2]


def test_a_minimal_file_by_hand(tmp_path: Path) -> None:
    file = _write(tmp_path / "a", '{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}   ', b"\0\0")
    assert read_header(file).tensors == {"a": TensorInfo("F4", (4,), 0, 2)}
    assert read_header(_write(tmp_path / "b", "{}")).tensors == {}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ('{"a":1,"a":2}', b"", "key 'a' twice"),
        ('{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', b"0000", "key 'dtype' twice"),
        ('{"a":', b"", "Expecting value"),
        ("[1]", b"", "not a JSON object"),
        (" {}", b"", "not a JSON object"),
        ('{"a":NaN}', b"", "NaN"),
        (b'{"\xff":1}', b"", "utf-8"),
        ("{" + '"a":{' * 100_000, b"", "recursion"),
        ('{"a":' + "9" * 5000 + "}", b"", "integer string"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"a": 1}, b"", "exactly dtype, shape and data_offsets"),
        ({"a": {**_entry(), "more": 1}}, b"0000", "exactly dtype, shape and data_offsets"),
        ({"../a": _entry()}, b"0000", "not allowed"),
        ({"a/../b": _entry()}, b"0000", "not allowed"),
        ({"/a": _entry()}, b"0000", "not allowed"),
        ({"a\0b": _entry()}, b"0000", "not allowed"),
        ({"a b": _entry()}, b"0000", "not allowed"),
        ({"": _entry()}, b"0000", "not allowed"),
        ({"a": _entry(dtype="F31")}, b"0000", "unknown dtype"),
        ({"a": _entry(shape=[-1])}, b"0000", "impossible shape"),
        ({"a": _entry(shape=[True])}, b"0000", "impossible shape"),
        ({"a": _entry(shape=[1.0])}, b"0000", "impossible shape"),
        ({"a": _entry(shape=[1] * 65)}, b"0000", "impossible shape"),
        ({"a": _entry(shape=[2**62] * 64)}, b"0000", "is not the 4 bytes"),
        ({"a": _entry(offsets=[4, 0])}, b"0000", "impossible data_offsets"),
        ({"a": _entry(offsets=[0, 4, 8])}, b"0000", "impossible data_offsets"),
        ({"a": _entry(shape=[2])}, b"0000", "is not the 4 bytes"),
        ({"a": _entry(dtype="F4", shape=[3], offsets=[0, 1])}, b"0", "is not the 1 bytes"),
        ({"a": _entry()}, b"000", "truncated: tensor 'a' ends at data byte 4, the file has 3"),
        ({"a": _entry()}, b"00000", "1 bytes after the last tensor"),
        ({"a": _entry(offsets=[4, 8])}, b"00000000", "leaves a hole"),
        ({"a": _entry(), "b": _entry(offsets=[2, 6])}, b"000000", "overlaps"),
        ({"a": _entry(), "b": _entry()}, b"0000", "overlaps"),
    ],
)
def test_each_fault_is_refused_by_name(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    file = _write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(UserError, match=message) as raised:
        read_header(file)
    assert str(file) in str(raised.value)


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.zeros(100)}, whole)
    data = whole.read_bytes()
    for size in (0, 7, 8, 20, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(UserError, match="cut"):
            read_header(tmp_path / "cut")
    torch.save({"a": torch.zeros(4)}, tmp_path / "pickle")
    with pytest.raises(UserError, match="header claims"):
        read_header(tmp_path / "pickle")
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path / "nowhere")
    with pytest.raises(UserError, match="16,000,000 allowed"):
        read_header(_write(tmp_path / "huge", "{}", length=16_000_001))


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 95), bit=st.integers(0, 7))
def test_no_flipped_header_bit_raises_anything_but_a_user_error(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    raw = json.dumps({"model.a": _entry(shape=[2], offsets=[0, 8]), "b": _entry("U8", [3], [8, 11])}).encode()
    content = bytearray(struct.pack("<Q", len(raw)) + raw + b"0" * 11)
    content[position] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(bytes(content))
    with contextlib.suppress(UserError):
        read_header(path)
