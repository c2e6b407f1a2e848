"""Packs the kind mxfp4 into ggml's MXFP4 blocks of 32 weights, 17 bytes: the exponent of the scale plus 127, then 16 bytes of codes.

Byte j holds code j in its low half and code j + 16 in its high half. A code has its sign in bit 3 (OCP MX v1.0, e2m1).

Source: ggml ``ggml-common.h`` (block_mxfp4), ``ggml-quants.c`` (dequantize_row_mxfp4).
"""

import numpy as np
from numpy.typing import NDArray

from .blocks import BLOCK, Bytes

_BIAS = 127


def pack_mxfp4(codes: Bytes, scales: NDArray[np.float32]) -> Bytes:
    """Pack a matrix: uint8 [out, in / 32, 17].

    Args:
        codes: uint8 [out, in], values in 0..15; ``in`` is a multiple of 32.
        scales: fp32 [out, in / 32], powers of two from 2^-127 to 2^127.

    Raises:
        ValueError: a code out of range, a scale that is no such power, or shapes that do not fit.
    """
    rows, columns = codes.shape
    if columns % BLOCK or scales.shape != (rows, columns // BLOCK):
        raise ValueError(f"codes {codes.shape} and scales {scales.shape} are no blocks of {BLOCK}")
    if codes.size and int(codes.max()) > 15:
        raise ValueError(f"codes reach {int(codes.max())}; the block holds 0..15")
    mantissas, exponents = np.frexp(scales)
    # frexp gives mantissas from 0.5 on, so 2^k is 0.5 x 2^(k + 1)
    stored = exponents - 1 + _BIAS
    if (mantissas != 0.5).any() or (stored < 0).any() or (stored > 2 * _BIAS).any():
        raise ValueError("a scale is no power of two from 2^-127 to 2^127")
    halves = codes.reshape(rows, -1, 2, BLOCK // 2)
    return np.concatenate([stored.astype(np.uint8)[:, :, None], halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)], axis=2)
