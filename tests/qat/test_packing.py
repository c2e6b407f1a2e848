"""Packing is exact for every width and odd sizes, and refuses what would spill."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoct.qat.packing import pack_bits, packed_width
from decoct.qat.spec import PACKED_BITS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SIZES = (1, 3, 7, 8, 9, 16, 31, 33, 100)


def random_codes(bits: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)


def slow_pack(codes: Tensor, bits: int) -> list[list[int]]:
    """One row as one long number, first code lowest, cut into signed 32-bit words."""
    packed = []
    for row in codes.tolist():
        number = sum((code + (1 << (bits - 1))) << (place * bits) for place, code in enumerate(row))
        words = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
        packed.append([word - (1 << 32) if word >> 31 else word for word in words])
    return packed


def test_pack_golden_words() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7, 0]], dtype=torch.int8)
    assert [word & 0xFFFFFFFF for word in pack_bits(codes, 4)[0].tolist()] == [0xF6543210, 0x00000008]


def test_pack_takes_views() -> None:
    codes = random_codes(4, 16, 12)
    assert torch.equal(pack_bits(codes.T, 4), pack_bits(codes.T.contiguous(), 4))


@pytest.mark.parametrize("code", [-9, 8])
def test_pack_refuses_codes_that_would_spill(code: int) -> None:
    codes = torch.zeros(2, 8, dtype=torch.int8)
    codes[1, 3] = code
    with pytest.raises(ValueError, match=re.escape("4 bits hold -8..7")):
        pack_bits(codes, 4)


def test_pack_refuses_other_widths_dtypes_and_shapes() -> None:
    codes = random_codes(2, 2, 8)
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits={bits} cannot be packed; use 2 to 8"):
            pack_bits(codes, bits)
    with pytest.raises(ValueError, match="int8 matrix"):
        pack_bits(codes.int(), 4)
    with pytest.raises(ValueError, match="int8 matrix"):
        pack_bits(codes[0], 4)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8), st.integers(0, 3), st.integers(1, 140), st.randoms(use_true_random=False))
def test_every_width_equals_the_obvious_packer(bits: int, rows: int, columns: int, random: Any) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.tensor([[random.randint(low, high) for _ in range(columns)] for _ in range(rows)], dtype=torch.int8).view(rows, columns)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_width(columns, bits)) == (rows, -(-columns * bits // 32))
    assert packed.tolist() == slow_pack(codes, bits)


def test_stream_crosses_words() -> None:
    # codes 0..10 of 3 bits: code 10 has two bits in the first word, one in the second
    codes = torch.tensor([[0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2]], dtype=torch.int8)
    stream = sum((code + 4) << (3 * place) for place, code in enumerate(codes[0].tolist()))
    assert [word & 0xFFFFFFFF for word in pack_bits(codes, 3)[0].tolist()] == [stream & 0xFFFFFFFF, stream >> 32]
    assert stream >> 32 == 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_unused_bits_are_zero(bits: int) -> None:
    codes = random_codes(bits, 3, 33)
    packed = pack_bits(codes, bits)
    used = 33 * bits % 32
    assert not bool((packed[:, -1] >> used & ((1 << (32 - used)) - 1)).any())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", SIZES)
def test_stream_equals_the_compressed_tensors_package(bits: int, columns: int) -> None:
    package = pytest.importorskip("compressed_tensors.compressors", reason="the compressed-tensors package is not installed")
    codes = random_codes(bits, 5, columns)
    theirs = package.pack_quantized.pack_to_int32(codes, bits)
    if theirs.shape[1] != packed_width(columns, bits) and bits not in PACKED_BITS:
        pytest.skip("this version of compressed-tensors packs 3, 5, 6 and 7 bits the older way")
    assert torch.equal(pack_bits(codes, bits), theirs)


@pytest.mark.parametrize("bits", range(2, 9))
def test_stream_kernels_give_the_same_words(bits: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = "cpu" if INTERPRETED else "cuda"
    for rows, columns in ((1, 1), (3, 33), (5, 64), (7, 100), (2, 1500), (0, 8)):
        codes = random_codes(bits, rows, columns).to(device)
        packed = pack_bits(codes, bits, backend="triton")
        assert torch.equal(packed, pack_bits(codes, bits, backend="reference"))
        assert torch.equal(pack_bits(codes.t(), bits, backend="triton"), pack_bits(codes.t(), bits, backend="reference"))


@pytest.mark.skipif(INTERPRETED, reason="it starts itself")
def test_stream_kernels_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # a process of its own: triton reads the variable when it is first imported
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "same_words"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "7 passed" in result.stdout, result.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_stream_kernels_compile(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from decoct.qat import packing_kernel

    kernel: Any = packing_kernel._pack_kernel
    types = {"codes_ptr": "*i8", "words_ptr": "*i32", "num_words": "i32", "COLUMNS": "i32", "WIDTH": "i32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    for bits in (3, 8):
        source = ASTSource(fn=kernel, signature=signature, constexprs={"BITS": bits, "BLOCK": 1024})
        assert compile_kernel(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
