"""The container, byte for byte as the ``gguf`` package writes it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoct.qat.export.gguf import writer
from decoct.qat.export.gguf.container import BLOCKS, F32, I32, TensorPlan, TensorType, Value, planned_file_bytes, write_gguf
from decoct.qat.source.quantized_source import open_source

Build = Callable[..., Path]
WIDE = {"hidden_size": 64, "intermediate_size": 96}
METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "text": "Grüße \N{SNOWMAN}",
    "yes": True,
    "small": 7,
    "large": 2**40,
    "signed": I32(-3),
    "share": F32(0.1),
    "tokens": ["a", "", "\N{SNOWMAN}"],
    "types": [1, 2, 6],
    "scores": [F32(-1.0), F32(0.5)],
}


def some_bytes(size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def plans() -> list[TensorPlan]:
    """A tensor of each type, none of which ends on a multiple of 32 bytes by itself."""
    found = []
    for kind, (elements, size) in BLOCKS.items():
        shape = (3, elements) if elements > 1 else (3,)
        found.append(TensorPlan(f"{kind.name}.weight", kind, shape, partial(some_bytes, 3 * size)))
    return found


def write_with_package(gguf: Any, file: Path, metadata: dict[str, Value], tensors: Sequence[TensorPlan]) -> None:
    kinds = gguf.GGUFValueType

    def typed(value: Any) -> tuple[Any, Any]:
        for kind, code in ((str, kinds.STRING), (bool, kinds.BOOL), (F32, kinds.FLOAT32), (I32, kinds.INT32)):
            if isinstance(value, kind):
                return getattr(value, "value", value), code
        return value, kinds.UINT32 if value < 2**32 else kinds.UINT64

    theirs = gguf.GGUFWriter(file, metadata["general.architecture"])
    for key, value in list(metadata.items())[1:]:
        if isinstance(value, list):
            element = kinds.INT32 if isinstance(value[0], int) else typed(value[0])[1]
            theirs.add_key_value(key, [typed(item)[0] for item in value], kinds.ARRAY, element)
        else:
            theirs.add_key_value(key, *typed(value))
    for tensor in tensors:
        # any dtype but uint8, whose shapes it takes for bytes
        theirs.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type)
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_ti_data_to_file()
    for tensor in tensors:
        theirs.write_tensor_data(np.ascontiguousarray(tensor.make()))
    theirs.close()


def test_the_gguf_package_writes_the_same_bytes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    write_gguf(tmp_path / "ours.gguf", METADATA, plans())
    write_with_package(gguf, tmp_path / "theirs.gguf", METADATA, plans())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gguf_package_writes_the_same_model(
    quantized_folder: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    source = open_source(quantized_folder(bits=bits, group_size=32, **WIDE))
    (tmp_path / "ours").mkdir()
    writer.write(tmp_path / "ours", source)
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(writer, "write_gguf", partial(write_with_package, gguf))
    writer.write(tmp_path / "theirs", source)
    assert (tmp_path / "ours" / writer.FILE).read_bytes() == (tmp_path / "theirs" / writer.FILE).read_bytes()


def test_the_size_is_known_before(tmp_path: Path) -> None:
    write_gguf(tmp_path / "some.gguf", METADATA, plans())
    assert (tmp_path / "some.gguf").stat().st_size == planned_file_bytes(METADATA, plans())


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_text("mine")
    with pytest.raises(FileExistsError):
        write_gguf(tmp_path / "some.gguf", METADATA, plans())
    assert (tmp_path / "some.gguf").read_text() == "mine"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    def short() -> np.ndarray[Any, Any]:
        return np.zeros(3, np.float32)

    cases: list[tuple[dict[str, Value], list[TensorPlan], str]] = [
        ({}, [TensorPlan("a", TensorType.F32, (4,), short)], "a: 12 bytes were made, 16 planned"),
        ({}, [TensorPlan("a", TensorType.Q4_0, (2, 33), short)], "rows of 33 are no multiple of a Q4_0 block"),
        ({"negative": -1}, [], "negative: no metadata type holds -1"),
        ({"far": I32(2**31)}, [], "far: int32 does not hold 2147483648"),
        ({"empty": []}, [], "empty: an array needs elements of one type"),
    ]
    for number, (metadata, tensors, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            write_gguf(tmp_path / f"{number}.gguf", metadata, tensors)
