"""Bytes of one matrix as exports pack it, from shape and spec alone. It imports no torch."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .spec import QuantSpec


def packed_matrix_bytes(shape: Sequence[int], spec: "QuantSpec | None") -> int:
    """Return the bytes of one tensor: codes in 32-bit words, scales and zero points; 16 bits per weight if ``spec`` is None."""
    if spec is None:
        return 2 * math.prod(shape)
    rows, columns = shape
    height, width = spec.scale_shape(rows, columns)
    # the only format that packs them has whole blocks
    if spec.super_block:
        return height * width * spec.super_block.nbytes
    # every row starts a new word; zero points are packed along the outputs (compressed-tensors)
    words = -(-columns * spec.bits // 32)
    zeros = 0 if spec.symmetric else 4 * width * -(-rows * spec.bits // 32)
    # nvfp4 has one fp32 scale for the tensor besides those of its groups
    return 4 * rows * words + height * width * _scale_bytes(spec) + zeros + (4 if spec.kind == "nvfp4" else 0)


def _scale_bytes(spec: "QuantSpec") -> int:
    # e8m0 and e4m3 scales take a byte
    return 1 if spec.kind in ("mxfp4", "nvfp4") else 4 if spec.scale_grid == "fp32" else 2
