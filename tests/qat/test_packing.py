"""Packing is exact for every width and odd sizes, and refuses what would spill."""

import re

import pytest
import torch
from torch import Tensor

from decoct.qat.packing import PACKED_BITS, pack_int32, packed_width, unpack_int32

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


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("columns", SIZES)
def test_pack_equals_the_obvious_packer_and_unpacks(bits: int, columns: int) -> None:
    codes = random_codes(bits, 3, columns)
    packed = pack_int32(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, packed_width(columns, bits)) == (3, -(-columns * bits // 32))
    assert packed.tolist() == slow_pack(codes, bits)
    assert torch.equal(unpack_int32(packed, bits, columns), codes)


def test_pack_golden_words() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7, 0]], dtype=torch.int8)
    assert [word & 0xFFFFFFFF for word in pack_int32(codes, 4)[0].tolist()] == [0xF6543210, 0x00000008]


def test_pack_takes_views() -> None:
    codes = random_codes(4, 16, 12)
    assert torch.equal(pack_int32(codes.T, 4), pack_int32(codes.T.contiguous(), 4))


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("columns", SIZES)
def test_pack_equals_the_compressed_tensors_package(bits: int, columns: int) -> None:
    package = pytest.importorskip("compressed_tensors.compressors", reason="the compressed-tensors package is not installed")
    codes = random_codes(bits, 5, columns)
    assert torch.equal(pack_int32(codes, bits), package.pack_quantized.pack_to_int32(codes, bits))


@pytest.mark.parametrize("code", [-9, 8])
def test_pack_refuses_codes_that_would_spill(code: int) -> None:
    codes = torch.zeros(2, 8, dtype=torch.int8)
    codes[1, 3] = code
    with pytest.raises(ValueError, match=re.escape("4 bits hold -8..7")):
        pack_int32(codes, 4)


def test_pack_refuses_other_widths_dtypes_and_shapes() -> None:
    codes = random_codes(2, 2, 8)
    with pytest.raises(ValueError, match="bits=3 cannot be packed; use 2, 4 or 8"):
        pack_int32(codes, 3)
    with pytest.raises(ValueError, match="int8 matrix"):
        pack_int32(codes.int(), 4)
    with pytest.raises(ValueError, match="int8 matrix"):
        pack_int32(codes[0], 4)
    with pytest.raises(ValueError, match=re.escape("9 codes of 4 bits need int32 [out, 2]")):
        unpack_int32(pack_int32(codes, 4), 4, 9)
